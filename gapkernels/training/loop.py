"""The training loop: one method, one seed, from the first step (or the last checkpoint) to the final metrics."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gapkernels import ContrastOptions, gap_loss
from gapkernels.environment import describe_environment
from gapkernels.errors import UserError, printable, shown
from gapkernels.gradient_cache import GradientCache
from gapkernels.reading import check
from gapkernels.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_weights,
    random_state,
    require_like,
    restore_random_state,
    save_checkpoint,
    seed_everything,
    write_text,
)
from gapkernels.training.config import Config, validate_config
from gapkernels.training.cost import StepMeter
from gapkernels.training.data import Dataset
from gapkernels.training.embeddings import Embeddings, write_embeddings
from gapkernels.training.encoders import MultimodalModel
from gapkernels.training.encoders.base import Encoder
from gapkernels.training.evaluation import computes_in_bfloat16, embed, score
from gapkernels.training.layout import CHECKPOINT, EMBEDDINGS, METRICS, RESULT, TENSORBOARD
from gapkernels.training.schedules import cosine_with_warmup, loss_weights

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LARGEST_LOGIT_SCALE = 100.0


class Trainer:
    """Trains one model with one method and one seed, and leaves everything it learned in one folder.

    Args:
        config: the experiment.
        method: name of the method in `config.methods`.
        seed: of the initial weights, the order of the data and every other random choice. The same seed gives every
            method the same start and the same batches.
        dataset: what to train and evaluate on.
        folder: where checkpoint, metrics, TensorBoard log and embeddings go.
        device: where to train.

    Raises:
        UserError: if the model does not fit the data set.
    """

    log: _MetricLog
    board: SummaryWriter

    def __init__(
        self, config: Config, method: str, seed: int, dataset: Dataset, folder: Path, device: torch.device
    ) -> None:
        config = config.for_modalities(dataset.specs)
        self.config, self.method_name, self.seed = config, method, seed
        self.method = config.methods[method]
        self.dataset, self.folder, self.device = dataset.to(device), folder, device
        self.steps_per_epoch = len(dataset.train) // config.optim.batch_size
        self.total_steps = self.steps_per_epoch * config.optim.epochs
        self.step = 0
        self.seconds = 0.0

        seed_everything(seed)
        self.model = MultimodalModel(config.model, dataset.specs).to(device)
        self.bfloat16 = computes_in_bfloat16(config.optim.precision, device)
        self.anchor_index = list(self.model.encoders).index(config.model.anchor)
        self.log_logit_scale = nn.Parameter(
            torch.tensor(-math.log(self.method.temperature), device=device), requires_grad=self.method.learn_temperature
        )
        self.optimizer = _build_optimizer(config, self.model, self.log_logit_scale, self.method.temperature_lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine_with_warmup(step, self.total_steps, config.optim.warmup)
        )

    def fit(self, label: str = "") -> dict[str, Any]:
        """Train to the end, from the checkpoint in the folder if there is one, with a progress bar on a terminal.

        Args:
            label: what the progress bar calls the run.

        Returns:
            What `result.json` in the folder holds: the final metrics on the test split, and how long it took.

        Raises:
            UserError: if training diverges, or the checkpoint in the folder cannot be used.
        """
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.folder.mkdir(parents=True, exist_ok=True)
        resuming = (self.folder / CHECKPOINT).is_file()
        log_size, log_digest = self._resume() if resuming else (0, None)
        started = time.monotonic() - self.seconds
        with (
            _deterministic_algorithms(self.config.run.deterministic),
            _limited_threads(self.config.run.threads),
            _MetricLog(self.folder / METRICS, log_size, log_digest) as self.log,
            SummaryWriter(self.folder / TENSORBOARD, purge_step=self.step + 1 if resuming else 0) as self.board,
            tqdm(
                total=self.total_steps,
                initial=self.step,
                desc=label,
                unit="step",
                leave=False,
                disable=None,
            ) as bar,
        ):
            if not resuming:
                self._calibrate()
                self._evaluate()
            meter, first_step = StepMeter(self.device), self.step
            meter.start()
            for batch in self._remaining_batches():
                logged = self._train_step(batch)
                bar.update()
                if logged:
                    bar.set_postfix(loss=f"{logged['loss']:.3f}", gap=f"{logged['modality_gap']:.3f}")
                epoch, position = divmod(self.step, self.steps_per_epoch)
                if position == 0 and epoch % self.config.run.eval_every == 0 and self.step < self.total_steps:
                    with meter.paused():
                        self._evaluate()
                if self.step % self.config.run.checkpoint_every == 0 or self.step == self.total_steps:
                    self.seconds = time.monotonic() - started
                    with meter.paused():
                        self._save()
            meter.stop()
            final = self._evaluate_fully()
        cost = meter.cost(self.step - first_step)
        result = {
            "method": self.method_name,
            "seed": self.seed,
            "metrics": final,
            "steps": self.step,
            "seconds": round(time.monotonic() - started, 3),
            "step_cost": None if cost is None else cost.model_dump(),
            "device": str(self.device),
            "precision": "bf16" if self.bfloat16 else "fp32",
            "class_names": list(self.dataset.class_names),
            "config": self.config.model_dump(mode="json"),
            "data": self.dataset.fingerprint,
            "environment": describe_environment(),
        }
        # Written last: a folder with a result is a finished run.
        write_text(self.folder / RESULT, json.dumps(result, indent=2) + "\n")
        return result

    def _remaining_batches(self) -> Iterator[Tensor]:
        """Yield the samples of each batch from the current step on, int64 [n]; they depend on seed and epoch alone."""
        size = self.config.optim.batch_size
        while self.step < self.total_steps:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset.train)))
            for start in range(position * size, self.steps_per_epoch * size, size):
                yield order[start : start + size]

    def _train_step(self, samples: Tensor) -> dict[str, float]:
        """Take one step on a batch; return what was logged of it, nothing for most steps."""
        optim = self.config.optim
        batch = self.dataset.train.batch(samples)
        weights = loss_weights(self.method, self.step / self.total_steps)
        self.model.train()
        size = optim.micro_batch_size
        cache = None
        if size is not None and size < optim.batch_size:
            cache = GradientCache(self._encode, _micro_batches(batch, size))
        terms = gap_loss(
            *(self._encode(batch) if cache is None else cache.embeddings),
            logit_scale=self.log_logit_scale.exp(),
            anchor=self.anchor_index,
            uniformity_t=self.method.uniformity_t,
            nce_weight=weights.nce,
            atp_weight=weights.atp,
            cu_weight=weights.cu,
            return_terms=True,
            **self._contrast_options(samples),
        )
        self.optimizer.zero_grad()
        terms.loss.backward()
        if cache is not None:
            cache.backward()
        if optim.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), optim.grad_clip)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        if self.method.learn_temperature:
            with torch.no_grad():
                self.log_logit_scale.clamp_(0.0, math.log(_LARGEST_LOGIT_SCALE))
        self.step += 1

        # Reading a value waits for the device, so not every step pays for it.
        if self.step % self.config.run.log_every != 0 and self.step < self.total_steps:
            return {}
        values = {name: value.item() for name, value in terms._asdict().items() if value is not None}
        if not math.isfinite(values["loss"]):
            raise self._diverged()
        values |= {f"{name}_weight": weight for name, weight in weights._asdict().items()}
        values |= {"lr": learning_rate, "logit_scale": self.log_logit_scale.exp().item()}
        self._record("train", values)
        return values

    def _contrast_options(self, samples: Tensor) -> ContrastOptions:
        """Return what the loss is told of samples that say the same: nothing where they are negatives as others."""
        method = self.method
        if method.duplicates == "negative":
            return {}
        return {
            "ids": self.dataset.train.ids[samples].to(self.device),
            "duplicates": method.duplicates,
            "uniformity_of_equal_ids": method.uniformity_of_equal_ids,
        }

    def _encode(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Augment and encode samples as they are stored: one embedding [n, D] per modality."""
        inputs = self.dataset.train.prepare(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return tuple(self.model(inputs).values())

    def _calibrate(self) -> None:
        """Show the encoders that ask for it the first training samples."""
        for name, encoder in self.model.encoders.items():
            assert isinstance(encoder, Encoder)
            samples = min(encoder.calibration_samples, len(self.dataset.train))
            if samples:
                batch = self.dataset.train.batch(torch.arange(samples))
                encoder.calibrate(self.dataset.train.prepare(batch)[name])

    def _evaluate(self) -> None:
        """Record what can be had quickly: geometry, retrieval and clustering, without the classifiers."""
        embeddings = self._embed_test_split()
        self._record("test", score(embeddings, self.config.model.anchor, classifiers=False))

    def _evaluate_fully(self) -> dict[str, float]:
        """Record every metric of the trained model and keep its embeddings of the test split."""
        embeddings = self._embed_test_split()
        metrics = score(embeddings, self.config.model.anchor)
        self._record("test", metrics)
        write_embeddings(self.folder / EMBEDDINGS, embeddings)
        return metrics

    def _embed_test_split(self) -> Embeddings:
        embeddings = embed(self.model, self.dataset.test, bfloat16=self.bfloat16)
        if not all(values.isfinite().all() for values in embeddings.modalities.values()):
            raise self._diverged()
        return embeddings

    def _diverged(self) -> UserError:
        return UserError(
            f"{self.method_name}, seed {self.seed}: training diverged before step {self.step}, loss or embeddings are "
            "not finite; try a smaller optim.lr or set optim.grad_clip"
        )

    def _record(self, split: str, values: Mapping[str, float]) -> None:
        self.log.append({"split": split, "step": self.step, "epoch": self.step / self.steps_per_epoch, **values})
        for name, value in values.items():
            self.board.add_scalar(f"{split}/{name}", value, self.step)

    def _save(self) -> None:
        self.board.flush()
        # Most steps do not look at their loss: what has diverged since must not take the place of the last good state.
        if not all(values.isfinite().all() for values in (*self.model.state_dict().values(), self.log_logit_scale)):
            raise self._diverged()
        log_size, log_digest = self.log.sync()
        state = {
            "config": self.config.model_dump(mode="json"),
            "method": self.method_name,
            "seed": self.seed,
            "step": self.step,
            "seconds": self.seconds,
            "data": self.dataset.fingerprint,
            "log_size": log_size,
            "log_digest": log_digest,
            "model": self.model.state_dict(),
            "log_logit_scale": self.log_logit_scale.detach(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": random_state(self.device),
        }
        save_checkpoint(self.folder / CHECKPOINT, state)

    def _resume(self) -> tuple[int, str]:
        """Bring back the state of the checkpoint.

        Returns:
            The size of the metric log at its time, in bytes, and the checksum of these.
        """
        path = self.folder / CHECKPOINT
        remedy = f"delete the folder {self.folder} to redo this run from its start"
        try:
            state = load_checkpoint(path)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
        try:
            checkpoint = check(state, Checkpoint, path)
            config = validate_config(checkpoint.config)
        except UserError as error:
            raise UserError(f"{path} comes from another version of the trainer; {remedy} ({error})") from error
        self._require_this_run(checkpoint, config, f"{path} is not of this run: ", remedy)
        initial = {parameter: parameter.detach().clone() for parameter in self._trained_parameters()}
        try:
            load_weights(self.model, checkpoint.model)
            require_like("log_logit_scale", checkpoint.log_logit_scale, self.log_logit_scale)
            with torch.no_grad():
                self.log_logit_scale.copy_(checkpoint.log_logit_scale)
            self._load_optimizer(checkpoint, initial)
            restore_random_state(checkpoint.random, self.device)
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{path} is damaged ({printable(str(error))}); {remedy}") from error
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        return checkpoint.log_size, checkpoint.log_digest

    def _require_this_run(self, checkpoint: Checkpoint, config: Config, foreign: str, remedy: str) -> None:
        if not self.config.same_experiment(config):
            raise UserError(f"{foreign}it has other settings ({self.config.difference(config)}); {remedy}")
        if (checkpoint.method, checkpoint.seed) != (self.method_name, self.seed):
            raise UserError(
                f"{foreign}it is of method {shown(checkpoint.method)}, seed {checkpoint.seed}, expected "
                f"{self.method_name}, seed {self.seed}; {remedy}"
            )
        if checkpoint.data != self.dataset.fingerprint:
            raise UserError(f"{foreign}the data has changed since it was written; bring it back, or {remedy}")
        if checkpoint.step > self.total_steps:
            raise UserError(f"{foreign}it is at step {checkpoint.step} of {self.total_steps}; {remedy}")

    def _trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters in the order in which the optimiser numbers them."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _load_optimizer(self, checkpoint: Checkpoint, initial: Mapping[nn.Parameter, Tensor]) -> None:
        """Bring back the moments of every parameter, and the place in the schedule.

        Args:
            checkpoint: where they are.
            initial: what the parameters were before the first step. One without moments has never been moved.

        Raises:
            ValueError: if a moment is missing or of another shape, or a setting or the place is another one.
        """
        own, found = self.optimizer.state_dict(), checkpoint.optimizer
        groups, moments = found.get("param_groups"), found.get("state")
        if not isinstance(groups, list) or not isinstance(moments, dict) or len(groups) != len(own["param_groups"]):
            raise ValueError("the optimizer has other groups of parameters")
        for group, expected in zip(groups, own["param_groups"], strict=True):
            # The learning rate moves; it follows from the schedule's place, which is compared below.
            if not isinstance(group, dict) or set(group) != set(expected):
                raise ValueError("the optimizer has other settings")
            if {**group, "lr": None} != {**expected, "lr": None}:
                raise ValueError("the optimizer has other settings")
        parameters = self._trained_parameters()
        if not set(moments) <= set(range(len(parameters))):
            raise ValueError("the optimizer holds moments of other parameters")
        for number, parameter in enumerate(parameters):
            if number not in moments:
                if not parameter.requires_grad or torch.equal(parameter, initial[parameter]):
                    continue
                raise ValueError(f"the optimizer holds no moments of parameter {number}, which has been trained")
            for name in ("exp_avg", "exp_avg_sq"):
                moment = moments[number].get(name) if isinstance(moments[number], dict) else None
                require_like(f"{name} of parameter {number}", moment, parameter)
            steps = moments[number].get("step")
            if set(moments[number]) != {"exp_avg", "exp_avg_sq", "step"} or not isinstance(steps, Tensor):
                raise ValueError(f"the moments of parameter {number} are not those of {self.config.optim.optimizer}")
            if steps.numel() != 1 or not 0 < float(steps) <= checkpoint.step:
                raise ValueError(f"the optimizer has taken {shown(steps.tolist())} steps, the run {checkpoint.step}")
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        # Where the schedule is follows from the step alone.
        schedule = {**self.scheduler.state_dict(), "last_epoch": checkpoint.step, "_step_count": checkpoint.step + 1}
        rates = [
            base * factor(checkpoint.step)
            for base, factor in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        ]
        if checkpoint.scheduler.get("last_epoch") != checkpoint.step or [group["lr"] for group in groups] != rates:
            raise ValueError("the learning rate is at another place of its schedule")
        self.scheduler.load_state_dict({**schedule, "_last_lr": rates})


class _MetricLog:
    """One JSON object per line, cut back to `size` bytes first: what came after the checkpoint is computed again.

    Args:
        path: the file.
        size: of what the checkpoint knows of it, in bytes.
        digest: checksum of these bytes; None where there is no checkpoint.
    """

    def __init__(self, path: Path, size: int, digest: str | None) -> None:
        self._file = path.open("a+b")
        self._file.seek(0)
        known = self._file.read(size)
        self._digest = hashlib.sha256(known)
        if len(known) < size or (digest is not None and self._digest.hexdigest() != digest):
            self._file.close()
            what = "is shorter than its checkpoint says" if len(known) < size else "is not the log of its checkpoint"
            raise UserError(f"{path} {what}; delete the folder {path.parent} to redo this run")
        self._file.truncate(size)
        self._file.seek(size)

    def __enter__(self) -> _MetricLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        self._digest.update(line)
        self._file.write(line)
        self._file.flush()

    def sync(self) -> tuple[int, str]:
        """Bring every record to the disk and return the size and the checksum of the file."""
        os.fsync(self._file.fileno())
        return self._file.tell(), self._digest.hexdigest()


def _micro_batches(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Cut a batch into parts of at most `size` samples."""
    parts = zip(*(values.split(size) for values in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def _build_optimizer(
    config: Config, model: nn.Module, log_logit_scale: nn.Parameter, temperature_lr: float
) -> torch.optim.Optimizer:
    """Build the optimiser; weight decay acts on matrices only, not on biases, norms and the temperature."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if log_logit_scale.requires_grad:
        groups.append({"params": [log_logit_scale], "weight_decay": 0.0, "lr": temperature_lr * config.optim.lr})
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optim.optimizer]
    return kind(groups, lr=config.optim.lr)


@contextmanager
def _deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Ask torch for deterministic algorithms where it has them, for as long as the block lasts."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills_before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if enabled:
        # cuBLAS reads this when it starts; without it, its results may differ between runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # It would write NaN into every new tensor before use, for about 7 % of a small step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills_before  # type: ignore[attr-defined]


@contextmanager
def _limited_threads(count: int | None) -> Iterator[None]:
    """Limit the threads of torch, and of the libraries under NumPy and scikit-learn, for as long as the block lasts."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)
