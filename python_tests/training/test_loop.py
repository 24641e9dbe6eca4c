"""Training itself, and above all that a killed run ends exactly like one that was left alone."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gapkernels.errors import UserError
from gapkernels.training.config import Config
from gapkernels.training.data import Dataset, load_dataset
from gapkernels.training.embeddings import read_embeddings
from gapkernels.training.experiment import run_experiment
from gapkernels.training.layout import CHECKPOINT, EMBEDDINGS, METRICS, RESULT, TENSORBOARD, run_folder
from gapkernels.training.loop import Trainer

SmallConfig = Callable[..., Config]
CPU = torch.device("cpu")

# 8 steps per epoch and a checkpoint every 7: all of them but every eighth lie in mid-epoch.
CHECKPOINT_EVERY = 7
# Kills its own process in the middle of a step, or of writing a checkpoint: no handler, no `finally`, no flush.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from gapkernels.training import checkpoint, loop
from gapkernels.training.config import read_config
from gapkernels.training.experiment import run_experiment

config, folder, where, when = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def train_step(trainer, inputs, original=loop.Trainer._train_step):
    original(trainer, inputs)
    if where == "step" and trainer.step == when:
        die()

def save(state, file, original=torch.save):
    if where == "checkpoint" and state["step"] == when:
        file.write(b"the first bytes of a checkpoint")
        file.flush()
        die()
    original(state, file)

loop.Trainer._train_step = train_step
torch.save = save
run_experiment(read_config(config), folder, device="cpu")
"""


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def assert_same(one: Any, other: Any) -> None:
    """Compare nested state bit by bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, generators, metrics of every step, final result and embeddings: all bit by bit."""
    states = [torch.load(folder / CHECKPOINT, weights_only=True) for folder in (one, other)]
    for state in states:
        del state["seconds"]
    assert_same(*states)
    assert (one / METRICS).read_bytes() == (other / METRICS).read_bytes()
    assert (one / EMBEDDINGS).read_bytes() == (other / EMBEDDINGS).read_bytes()
    results = [json.loads((folder / RESULT).read_text()) for folder in (one, other)]
    assert results[0]["metrics"] == results[1]["metrics"]


@pytest.fixture(scope="module")
def resume_config(small_config: SmallConfig) -> Config:
    # Dropout makes the generators matter; a learned temperature and the ramps make the step number matter.
    config = small_config(
        seeds=[3],
        run__checkpoint_every=CHECKPOINT_EVERY,
        methods__gap__learn_temperature=True,
        model__encoders__text__dropout=0.3,
    )
    return config.model_copy(update={"methods": {"gap": config.methods["gap"]}})


@pytest.fixture(scope="module")
def unbroken(resume_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run_experiment(resume_config, folder, device="cpu")
    return run_folder(folder, "gap", 3)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("where", "when", "checkpoint_step"),
    [("step", 5, None), ("step", 13, 7), ("step", 20, 14), ("checkpoint", 14, 7)],
    ids=["before the first checkpoint", "in mid-epoch", "in the third epoch", "while writing a checkpoint"],
)
def test_a_killed_run_resumes_bit_by_bit(
    resume_config: Config, unbroken: Path, tmp_path: Path, where: str, when: int, checkpoint_step: int | None
) -> None:
    from gapkernels.training.config import dump_config

    settings = tmp_path / "settings.yaml"
    settings.write_text(dump_config(resume_config))
    folder = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, settings, folder, where, str(when)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = run_folder(folder, "gap", 3)
    assert not (run / RESULT).exists()
    if checkpoint_step is None:
        assert not (run / CHECKPOINT).exists()
    else:
        assert torch.load(run / CHECKPOINT, weights_only=True)["step"] == checkpoint_step
        # The log is ahead of the checkpoint: what the killed process wrote in vain must vanish.
        assert records(run)[-1]["step"] > checkpoint_step

    time.sleep(1.1)  # TensorBoard puts its files in order by the second in which they were opened
    run_experiment(resume_config, folder, device="cpu", existing="require")
    assert_same_run(run, unbroken)
    assert tensorboard_scalars(run, "train/loss") == tensorboard_scalars(unbroken, "train/loss")


def tensorboard_scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / TENSORBOARD))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def assert_close(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> None:
    assert [step for step, _ in one] == [step for step, _ in other]
    assert [value for _, value in one] == pytest.approx([value for _, value in other], rel=1e-6)


def test_tensorboard_and_metric_log_agree(unbroken: Path) -> None:
    logged = [(record["step"], record["loss"]) for record in records(unbroken) if record["split"] == "train"]
    assert_close(tensorboard_scalars(unbroken, "train/loss"), logged)
    gaps = [(record["step"], record["gap"]) for record in records(unbroken) if record["split"] == "test"]
    assert [step for step, _ in gaps] == [0, 8, 16, 24]
    assert_close(tensorboard_scalars(unbroken, "test/gap"), gaps)


def test_the_log_holds_terms_weights_and_temperature(unbroken: Path) -> None:
    train = [record for record in records(unbroken) if record["split"] == "train"]
    assert [record["step"] for record in train] == list(range(3, 25, 3))
    for record in train:
        atp, cu = record["align_true_pairs"], record.get("centroid_uniformity", 0.0)
        weighted = record["info_nce"] + record["atp_weight"] * atp + record["cu_weight"] * cu
        assert record["loss"] == pytest.approx(weighted, rel=1e-4)
        # A term that weighs nothing is not computed.
        assert ("centroid_uniformity" in record) == (record["cu_weight"] > 0)
        assert record["epoch"] == record["step"] / 8
    assert train[-1]["atp_weight"] > 1.9
    assert train[-1]["cu_weight"] == 0
    assert train[0]["logit_scale"] != train[-1]["logit_scale"]


def test_training_beats_chance_by_far(finished: Path) -> None:
    for method in ("clip-lt", "gap"):
        result = json.loads((run_folder(finished, method, 0) / RESULT).read_text())
        before = records(run_folder(finished, method, 0))[0]
        # Ten digits: a random guess is right one time in ten.
        assert before["image_to_text/R@1"] < 0.25
        assert result["metrics"]["image_to_text/R@1"] > 0.4


def test_the_gap_method_closes_the_gap(finished: Path) -> None:
    def final(method: str, seed: int) -> dict[str, float]:
        return json.loads((run_folder(finished, method, seed) / RESULT).read_text())["metrics"]

    for seed in (0, 1):
        assert final("gap", seed)["gap"] < 0.7 * final("clip-lt", seed)["gap"]
        assert final("gap", seed)["true_pair_cosine"] > final("clip-lt", seed)["true_pair_cosine"]


def test_methods_with_one_seed_start_alike_and_seeds_do_not(finished: Path) -> None:
    start = {
        (method, seed): records(run_folder(finished, method, seed))[0]
        for method in ("clip-lt", "gap")
        for seed in (0, 1)
    }
    assert start["clip-lt", 0] == start["gap", 0]
    assert start["gap", 0] != start["gap", 1]


def test_embeddings_of_the_test_split_are_kept(finished: Path) -> None:
    kept = read_embeddings(run_folder(finished, "gap", 0) / EMBEDDINGS)
    assert list(kept.modalities) == ["image", "text"]
    assert kept.modalities["image"].shape == (200, 16)
    assert kept.labels is not None
    assert len(kept.labels) == 200


@pytest.mark.parametrize(
    "change",
    [
        {"optim__precision": "bf16"},
        {"model__encoders__image": {"kind": "fast-cnn", "widths": [4]}},
        {"optim__grad_clip": 0.5, "optim__optimizer": "adamw"},
    ],
)
def test_options_train(small_config: SmallConfig, tmp_path: Path, change: dict[str, Any]) -> None:
    config = small_config(optim__epochs=1, **change)
    result = Trainer(config, "gap", 0, load_dataset(config.data), tmp_path, CPU).fit()
    assert math.isfinite(result["metrics"]["gap"])


def test_any_number_of_modalities_trains(small_config: SmallConfig, tmp_path: Path) -> None:
    config = small_config(optim__epochs=1, model__encoders__mirrored={"kind": "image-cnn", "width": 8})

    def with_mirrored(dataset: Dataset) -> Dataset:
        def extend(split: Any) -> Any:
            images = split.modalities["image"]
            return replace(split, modalities={**split.modalities, "mirrored": images.flip(-1)})

        specs = {**dataset.specs, "mirrored": dataset.specs["image"]}
        return replace(dataset, train=extend(dataset.train), test=extend(dataset.test), specs=specs)

    result = Trainer(config, "gap", 0, with_mirrored(load_dataset(config.data)), tmp_path, CPU).fit()
    ways = [key for key in result["metrics"] if key.endswith("/R@1")]
    assert ways == ["image_to_text/R@1", "text_to_image/R@1", "mirrored_to_text/R@1", "text_to_mirrored/R@1"]


def test_divergence_is_an_error_and_leaves_no_result(small_config: SmallConfig, tmp_path: Path) -> None:
    config = small_config()
    trainer = Trainer(config, "gap", 0, load_dataset(config.data), tmp_path, CPU)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="gap, seed 0: training diverged"):
        trainer.fit()
    assert not (tmp_path / RESULT).exists()


def test_weights_that_are_not_finite_are_never_saved(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that diverges need not be one that looks at its loss: the last good checkpoint stays."""
    config = small_config(run__checkpoint_every=4, run__log_every=1000, run__eval_every=1000)
    train_step = Trainer._train_step

    def diverge(trainer: Trainer, inputs: Any) -> Any:
        found = train_step(trainer, inputs)
        if trainer.step == 6:
            with torch.no_grad():
                next(trainer.model.parameters()).view(-1)[0] = torch.nan
        return found

    monkeypatch.setattr(Trainer, "_train_step", diverge)
    with pytest.raises(UserError, match="gap, seed 0: training diverged before step 8"):
        Trainer(config, "gap", 0, load_dataset(config.data), tmp_path, CPU).fit()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 4
    assert all(values.isfinite().all() for values in state["model"].values())


def test_torch_settings_are_restored(small_config: SmallConfig, tmp_path: Path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    config = small_config(optim__epochs=1)
    Trainer(config, "clip-ft", 0, load_dataset(config.data), tmp_path, CPU).fit()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_learned_temperature_has_a_learning_rate_of_its_own(tmp_path: Path, small_config: SmallConfig) -> None:
    moved = {}
    for factor in (1.0, 10.0):
        config = small_config(
            methods__gap__learn_temperature=True, methods__gap__temperature_lr=factor, optim__warmup=0.0
        )
        trainer = Trainer(config, "gap", 0, load_dataset(config.data), tmp_path / str(factor), CPU)
        before = trainer.log_logit_scale.item()
        trainer._record = lambda split, values: None  # type: ignore[method-assign]
        trainer._train_step(next(iter(trainer._remaining_batches())))
        # Adam's first step has the length of the learning rate, whatever the gradient.
        moved[factor] = abs(trainer.log_logit_scale.item() - before)
    assert moved[1.0] == pytest.approx(config.optim.lr, rel=1e-3)
    assert moved[10.0] == pytest.approx(10 * config.optim.lr, rel=1e-3)


@pytest.mark.parametrize(
    ("duplicates", "of_equal_ids"), [("negative", True), ("mask", True), ("mask", False), ("positive", False)]
)
@pytest.mark.parametrize("micro_batch_size", [None, 10])
def test_samples_that_say_the_same(
    tmp_path: Path, small_config: SmallConfig, duplicates: str, of_equal_ids: bool, micro_batch_size: int | None
) -> None:
    config = small_config(
        methods__gap__duplicates=duplicates,
        methods__gap__uniformity_of_equal_ids=of_equal_ids,
        model__encoders__text__dropout=0.0,
        optim__micro_batch_size=micro_batch_size,
        optim__epochs=1,
        run__log_every=1,
    )
    trainer = Trainer(config, "gap", 0, load_dataset(config.data), tmp_path, CPU)
    samples = next(iter(trainer._remaining_batches()))
    with torch.no_grad():
        batch = trainer.dataset.train.batch(samples)
        image, text = (F.normalize(x.double(), dim=1) for x in trainer._encode((0, batch)))
    labels = trainer.dataset.train.labels[samples]
    equal = labels[:, None] == labels[None]
    other = equal.fill_diagonal_(False) if duplicates == "mask" else torch.zeros_like(equal)
    logits = (text @ image.T / config.methods["gap"].temperature).masked_fill(other, -math.inf)
    if duplicates == "positive":
        target = (labels[:, None] == labels[None]).double()
        target = target / target.sum(dim=1, keepdim=True)
    else:
        target = torch.eye(len(labels), dtype=torch.float64)
    expected = (
        -sum((target * x.log_softmax(dim=1).masked_fill(target == 0, 0)).sum(dim=1).mean() for x in (logits, logits.T))
        / 2
    )
    centroids = F.normalize(image + text, dim=1)
    pairs = torch.ones_like(equal).triu(1)
    if not of_equal_ids:
        pairs &= labels[:, None] != labels[None]
    distances = (centroids[:, None] - centroids[None]).square().sum(dim=2)
    uniformity = (-config.methods["gap"].uniformity_t * distances[pairs]).exp().mean().log()

    logged: dict[str, float] = {}
    trainer._record = lambda split, values: logged.update(values)  # type: ignore[method-assign]
    trainer._train_step(samples)
    assert logged["info_nce"] == pytest.approx(expected.item(), rel=1e-5)
    assert logged["centroid_uniformity"] == pytest.approx(uniformity.item(), rel=1e-5)


def test_the_uniformity_of_different_names_needs_to_know_them(small_config: SmallConfig) -> None:
    with pytest.raises(UserError, match="needs `duplicates` to be mask or positive, got negative"):
        small_config(methods__gap__uniformity_of_equal_ids=False)
