"""The training loop: one method, one seed, from the first step (or the last checkpoint) to the final metrics."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gapkernels import ContrastOptions, gap_loss
from gapkernels.environment import describe_environment
from gapkernels.errors import SharedError, Stopped, UserError, printable, shown
from gapkernels.gradient_cache import GradientCache
from gapkernels.reading import check
from gapkernels.training.checkpoint import (
    Checkpoint,
    keep_newest,
    load_checkpoint,
    load_weights,
    pack_checkpoint,
    random_state,
    require_like,
    restore_random_state,
    save_checkpoint,
    seed_everything,
    seed_torch,
    unpack_checkpoint,
    write_text,
)
from gapkernels.training.config import Config, validate_config
from gapkernels.training.cost import StepMeter
from gapkernels.training.data import Dataset
from gapkernels.training.embeddings import Embeddings, write_embeddings
from gapkernels.training.encoders import MultimodalModel
from gapkernels.training.encoders.base import Encoder
from gapkernels.training.evaluation import compute_precision, embed, score
from gapkernels.training.layout import CHECKPOINT, EMBEDDINGS, RESULT
from gapkernels.training.optimizer import build_optimizer, load_optimizer, trained_parameters
from gapkernels.training.processes import Processes, mean_of_each_parameter
from gapkernels.training.run_log import RunLog, open_log
from gapkernels.training.schedules import cosine_with_warmup, loss_weights
from gapkernels.training.stopping import StopRequest
from gapkernels.training.torch_settings import deterministic_algorithms, limited_threads

_LARGEST_LOGIT_SCALE = 100.0
_LONGEST_REASON = 300  # characters of a library's message that ours quotes
# Its old name warns from torch 2.13 on.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class Trainer:
    """Trains one model with one method and one seed, and leaves everything it learned in one folder.

    Args:
        config: the experiment.
        method: name of the method in `config.methods`.
        seed: of the initial weights, the order of the data and every other random choice. The same seed gives every
            method the same start and the same batches.
        dataset: what to train and evaluate on.
        folder: where checkpoint, metrics, TensorBoard log and embeddings go.
        processes: this process, its device, and the others that train the model with it: a device alone is one process.
            Each holds its part of every batch, and the batch decides the numbers: with parts of one size
            (`optim.micro_batch_size`) they are the same for any number of processes, up to rounding.

    Raises:
        UserError: if the model does not fit the data set, or the processes cannot share a batch evenly.
    """

    def __init__(
        self,
        config: Config,
        method: str,
        seed: int,
        dataset: Dataset,
        folder: Path,
        processes: Processes | torch.device,
    ) -> None:
        self.processes = processes if isinstance(processes, Processes) else Processes(processes)
        device = self.processes.device
        if config.optim.batch_size % self.processes.size:
            raise UserError(
                f"optim.batch_size must be a multiple of the number of processes, {self.processes.size}, got "
                f"{config.optim.batch_size}"
            )
        config = config.for_modalities(dataset.specs)
        self.config, self.method_name, self.seed = config, method, seed
        self.method = config.methods[method]
        self.dataset, self.folder, self.device = dataset.to(device), folder, device
        self.steps_per_epoch = len(dataset.train) // config.optim.batch_size
        self.total_steps = self.steps_per_epoch * config.optim.epochs
        self.step = 0
        self.seconds = 0.0
        self.log = RunLog()

        seed_everything(seed)
        self.model = MultimodalModel(config.model, dataset.specs).to(device)
        self.precision = compute_precision(config.optim.precision, device)
        if self.precision == "fp64":
            self.model.double()
        self._encoders: nn.Module = self.model  # where there are several processes, what averages their gradients
        self.anchor_index = list(self.model.encoders).index(config.model.anchor)
        self.log_logit_scale = nn.Parameter(
            torch.tensor(-math.log(self.method.temperature), device=device, dtype=next(self.model.parameters()).dtype),
            requires_grad=self.method.learn_temperature,
        )
        self.optimizer = build_optimizer(config, self.model, self.log_logit_scale, self.method.temperature_lr)
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
        resuming = self.processes.on_first(self._prepare_folder)
        log_size, log_digest = self._resume() if resuming else (0, None)
        started = time.monotonic() - self.seconds
        with (
            deterministic_algorithms(self.config.run.deterministic),
            limited_threads(self.config.run.threads),
            open_log(self.folder, label, self.step, self.total_steps, log_size, log_digest)
            if self.processes.is_first
            else nullcontext(RunLog()) as self.log,
            StopRequest(self.processes) as stop,
        ):
            if not resuming:
                self._calibrate()
            self._distribute()
            if not resuming:
                self._evaluate()
            meter, first_step = StepMeter(self.device), self.step
            meter.start()
            for batch in self._remaining_batches():
                self.log.advance(self._train_step(batch))
                epoch, position = divmod(self.step, self.steps_per_epoch)
                if position == 0 and epoch % self.config.run.eval_every == 0 and self.step < self.total_steps:
                    with meter.paused():
                        self._evaluate()
                stopping = stop.reached() and self.step < self.total_steps
                if stopping or self.step % self.config.run.checkpoint_every == 0 or self.step == self.total_steps:
                    self.seconds = time.monotonic() - started
                    with meter.paused():
                        self._save()
                if stopping:
                    raise Stopped(f"stopped behind step {self.step}; the same command goes on from there")
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
            "processes": self.processes.size,
            "precision": self.precision,
            "class_names": list(self.dataset.class_names),
            "config": self.config.model_dump(mode="json"),
            "data": self.dataset.fingerprint,
            "environment": describe_environment(),
        }
        # Written last: a folder with a result is a finished run.
        self.processes.on_first(lambda: write_text(self.folder / RESULT, json.dumps(result, indent=2) + "\n"))
        return result

    def _prepare_folder(self) -> bool:
        """Make the folder and tell whether it holds a checkpoint to go on from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return (self.folder / CHECKPOINT).is_file()

    def _distribute(self) -> None:
        """Let several processes average the gradients of the encoders; all start from the first one's weights."""
        if self.processes.size == 1 or not any(p.requires_grad for p in self.model.parameters()):
            return
        sync: dict[str, Any] = {_SYNC_BUFFERS: False}  # `_average_buffers` takes all processes into account
        self._encoders = parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True, **sync)
        if self.config.run.deterministic:
            parallel.register_comm_hook(None, mean_of_each_parameter)

    def _average_buffers(self) -> None:
        """Give every process the same running statistics of batch norm: the mean of what each has seen."""
        self.processes.average([b for b in self.model.buffers() if b.is_floating_point()])

    def _remaining_batches(self) -> Iterator[Tensor]:
        """Yield the samples of each batch from the current step on, int64 [N]; they depend on seed and epoch alone.

        The last batch of an epoch, if incomplete, is left out, and no sample is ever repeated to fill it: every
        gradient is that of a whole batch of different samples.
        """
        size = self.config.optim.batch_size
        while self.step < self.total_steps:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset.train)))
            for start in range(position * size, self.steps_per_epoch * size, size):
                yield order[start : start + size]

    def _train_step(self, samples: Tensor) -> dict[str, float]:
        """Take one step on a batch, int64 [N]; return what was logged of it, nothing for most steps."""
        optim = self.config.optim
        samples = self.processes.part(samples)
        first = self.processes.rank * len(samples)
        batch = self.dataset.train.batch(samples)
        weights = loss_weights(self.method, self.step / self.total_steps)
        self.model.train()
        size = optim.micro_batch_size
        cache = None
        if size is not None and size < len(samples):
            starts = range(first, first + len(samples), size)
            cache = GradientCache(self._encode, list(zip(starts, _micro_batches(batch, size), strict=True)))
        terms = gap_loss(
            *(self._encode((first, batch)) if cache is None else cache.embeddings),
            logit_scale=self.log_logit_scale.exp(),
            anchor=self.anchor_index,
            uniformity_t=self.method.uniformity_t,
            nce_weight=weights.nce,
            atp_weight=weights.atp,
            cu_weight=weights.cu,
            return_terms=True,
            group=self.processes.group,
            **self._contrast_options(samples),
        )
        self.optimizer.zero_grad()
        terms.loss.backward()
        if cache is not None:
            cache.backward(no_sync=getattr(self._encoders, "no_sync", None))
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

    def _encode(self, part: tuple[int, Mapping[str, Tensor]]) -> tuple[Tensor, ...]:
        """Augment and encode samples as they are stored: one embedding [n, D] per modality.

        Random numbers follow from the seed, the step and the place of the part in the batch, not from who encodes it.

        Args:
            part: place of its first sample in the batch, and the samples.
        """
        first, batch = part
        seed_torch(self.seed, self.step, first)
        inputs = self.dataset.train.prepare(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return tuple(self._encoders(inputs).values())

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
        metrics = self.processes.on_first(lambda: score(embeddings, self.config.model.anchor, classifiers=False))
        self._record("test", metrics)

    def _evaluate_fully(self) -> dict[str, float]:
        """Record every metric of the trained model and keep its embeddings of the test split."""
        embeddings = self._embed_test_split()
        # Clustering and classifiers see all samples at once: the first process computes them.
        metrics = self.processes.on_first(lambda: score(embeddings, self.config.model.anchor))
        self._record("test", metrics)
        self.processes.on_first(lambda: write_embeddings(self.folder / EMBEDDINGS, embeddings))
        return metrics

    def _embed_test_split(self) -> Embeddings:
        """Encode the test split, each process its part; all get the whole."""
        self._average_buffers()
        embeddings = embed(self.model, self.dataset.test, bfloat16=self.precision == "bf16", processes=self.processes)
        if not all(values.isfinite().all() for values in embeddings.modalities.values()):
            raise self._diverged()
        return embeddings

    def _diverged(self) -> UserError:
        # Loss, weights and gathered embeddings are the same on every process.
        return SharedError(
            f"{self.method_name}, seed {self.seed}: training diverged before step {self.step}, loss or embeddings are "
            "not finite; try a smaller optim.lr or set optim.grad_clip"
        )

    def _record(self, split: str, values: Mapping[str, float]) -> None:
        self.log.record(split, self.step, self.step / self.steps_per_epoch, values)

    def _save(self) -> None:
        self._average_buffers()
        # Most steps do not look at their loss: what has diverged since must not take the place of the last good state.
        if not all(values.isfinite().all() for values in (*self.model.state_dict().values(), self.log_logit_scale)):
            raise self._diverged()
        self.processes.on_first(self._write_checkpoint)

    def _write_checkpoint(self) -> None:
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
        keep_newest(self.folder / CHECKPOINT, self.step, self.config.run.keep_checkpoints)

    def _resume(self) -> tuple[int, str]:
        """Bring back the state of the checkpoint.

        Returns:
            The size of the metric log at its time, in bytes, and the checksum of these.
        """
        if self.processes.size == 1:
            return self._restore(self._read_checkpoint())
        # Sent as it is in the file: the other processes need not see that.
        content = self.processes.on_first(lambda: pack_checkpoint(self._read_checkpoint()))
        return self.processes.everywhere(lambda: self._restore(unpack_checkpoint(content)))

    def _remedy(self) -> str:
        return f"delete the folder {self.folder} to redo this run from its start"

    def _read_checkpoint(self) -> dict[str, Any]:
        try:
            return load_checkpoint(self.folder / CHECKPOINT)
        except UserError as error:
            raise UserError(f"{error}; {self._remedy()}") from error

    def _restore(self, state: dict[str, Any]) -> tuple[int, str]:
        path, remedy = self.folder / CHECKPOINT, self._remedy()
        try:
            checkpoint = check(state, Checkpoint, path)
            config = validate_config(checkpoint.config)
        except UserError as error:
            raise UserError(f"{path} comes from another version of the trainer; {remedy} ({error})") from error
        self._require_this_run(checkpoint, config, f"{path} is not of this run: ", remedy)
        initial = {parameter: parameter.detach().clone() for parameter in trained_parameters(self.optimizer)}
        try:
            load_weights(self.model, checkpoint.model)
            require_like("log_logit_scale", checkpoint.log_logit_scale, self.log_logit_scale)
            with torch.no_grad():
                self.log_logit_scale.copy_(checkpoint.log_logit_scale)
            load_optimizer(self.optimizer, self.scheduler, checkpoint, initial)
            restore_random_state(checkpoint.random, self.device)
        except (ValueError, RuntimeError, TypeError) as error:
            # torch appends pages to some of its messages.
            reason = printable(str(error).partition("\n")[0])[:_LONGEST_REASON]
            raise UserError(f"{path} is damaged ({reason}); {remedy}") from error
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


def _micro_batches(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Cut a batch into parts of at most `size` samples."""
    parts = zip(*(values.split(size) for values in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]
