"""The paper's experiment as one command, on tiny data in the real formats."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.data_files import write_cifar_jpegs, write_coco, write_mnist, write_spoken_digits
from training.real_data import real_data

from gapkernels.cli import main
from gapkernels.metrics import knn_accuracy
from gapkernels.training.config import load_config, preset_names
from gapkernels.training.data import load_dataset
from gapkernels.training.embeddings import NO_CLASS, Embeddings
from gapkernels.training.evaluation import score
from gapkernels.training.layout import METRICS, run_folder
from gapkernels.training.loop import Trainer
from gapkernels.training.paper import paper_results
from gapkernels.training.plots import draw_comparison, draw_plots
from gapkernels.training.reproduce import batch_configs
from gapkernels.training.results import load_experiment, summarise, table_rows

CPU = torch.device("cpu")
TINY = {
    "cifar10-small": ["--data.train_samples", "null", "--data.test_samples", "null"],
    "cifar10-fast": ["--model.encoders.image.widths", "[4, 4, 4]"],
    "av-mnist-small": ["--data.train_samples", "null", "--data.test_samples", "null"],
    "mscoco-mini": ["--data.image_size", "16", "--model.encoders.image.width", "4"],
}


def write_tiny_data(folder: Path) -> Path:
    write_cifar_jpegs(folder / "cifar10")
    write_mnist(folder / "mnist")
    write_spoken_digits(folder / "fsdd")
    write_coco(folder / "coco")
    return folder


def reproduce(preset: str, data: Path, out: Path, *more: str) -> int:
    words = ["reproduce", "--dataset", preset, "--data-dir", str(data), "--out", str(out), "--device", "cpu"]
    return main([*words, "--optim.epochs", "1", *TINY[preset], *more])


def test_every_data_set_of_the_paper_has_its_results_and_presets() -> None:
    for dataset in ("cifar10", "mscoco", "av-mnist"):
        published = paper_results(dataset)
        presets = [load_config(name) for name in preset_names()]
        for config in (config for config in presets if config.data.dataset == dataset):
            assert list(config.methods)[:3] == list(published) == ["clip-lt", "clip-ft", "gap"]
        assert published["gap"]["gap"] < min(published["clip-lt"]["gap"], published["clip-ft"]["gap"])
        assert published["gap"]["v_measure"] > max(published[clip]["v_measure"] for clip in ("clip-lt", "clip-ft"))
    assert paper_results("digits") == {}


@pytest.mark.parametrize("preset", list(TINY))
def test_three_methods_stand_beside_the_paper(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_tiny_data(tmp_path / "data"), tmp_path / "out"
    assert reproduce(preset, data, out, "--seeds", "0", "--batch-sizes", "10") == 0
    table = capsys.readouterr().out
    for method in ("clip-lt", "clip-ft", "gap"):
        assert f"\n{method} " in table
        assert f"\n{method} (paper)" in table
    content = json.loads((out / "results.json").read_text())
    config = load_config(preset)
    assert content["paper"] == paper_results(config.data.dataset)
    assert [experiment["batch_size"] for experiment in content["experiments"]] == [10]
    experiment = content["experiments"][0]
    assert experiment["config"]["optim"]["batch_size"] == 10
    assert experiment["environment"]["torch"] == torch.__version__
    for method in ("clip-lt", "clip-ft", "gap"):
        assert math.isfinite(experiment["methods"][method]["metrics"]["gap"]["mean"])
        assert experiment["methods"][method]["seeds"] == [0]
    assert (out / "report.html").is_file()
    names = {path.name for path in (out / "batch-10" / "plots").iterdir()}
    assert {"summary.png", "gap-against-v-measure.png", "space-gap-by-modality.png", "space-gap-by-class.png"} <= names


def test_batch_sizes_are_compared_and_finished_runs_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_tiny_data(tmp_path / "data"), tmp_path / "out"
    command = ("cifar10-small", data, out, "--methods", "gap")
    assert reproduce(*command, "--seeds", "0", "--batch-sizes", "10") == 0
    log = run_folder(out / "batch-10", "gap", 0) / METRICS
    written = log.stat().st_mtime_ns
    assert reproduce(*command, "--seeds", "0,1", "--batch-sizes", "10,30") == 0
    assert log.stat().st_mtime_ns == written
    assert "gap, seed 0: already finished" in capsys.readouterr().err
    experiments = [load_experiment(out / f"batch-{size}") for size in (10, 30)]
    assert [len(experiment.runs) for experiment in experiments] == [2, 2]
    rates = [experiment.config.optim.lr for experiment in experiments]
    assert rates[1] / rates[0] == pytest.approx(math.sqrt(3))
    expected = {"batch-size-gap", "batch-size-v_measure", "batch-size-epoch_seconds"}
    assert {plot.name for plot in draw_comparison(experiments)} >= expected
    content = json.loads((out / "results.json").read_text())
    for entry, experiment in zip(content["experiments"], experiments, strict=True):
        costs = [run.step_cost for run in experiment.runs]
        steps = len(load_dataset(experiment.config.data, data).train) // experiment.config.optim.batch_size
        assert entry["methods"]["gap"]["epoch_seconds"] == pytest.approx(
            [steps * cost.seconds for cost in costs if cost is not None]
        )
    assert draw_comparison(experiments[:1]) == []
    assert (out / "plots" / "batch-size-gap.png").is_file()


def test_the_learning_rate_may_stay() -> None:
    configs = batch_configs("cifar10", [], {}, [256, 1024], "none")
    assert [config.optim.lr for config in configs.values()] == [1e-4, 1e-4]
    assert [config.optim.batch_size for config in configs.values()] == [256, 1024]
    assert list(batch_configs("cifar10", [], {"optim.batch_size": 64}, None, "sqrt")) == [64]


@pytest.mark.parametrize("sizes", ["1", "many", "256,", "2.5"])
def test_batch_sizes_must_be_numbers(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--dataset", "cifar10", "--batch-sizes", sizes]) == 2
    assert "--batch-sizes must be whole numbers above 1" in capsys.readouterr().err


def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for preset, words in (("cifar10", "CIFAR-10 not found"), ("mscoco", "MS-COCO not found"), ("features", "no embed")):
        assert main(["reproduce", "--dataset", preset, "--data-dir", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_features_train_from_a_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    meaning = generator.normal(size=(120, 4))
    np.savez(
        tmp_path / "train.npz",
        image=meaning @ generator.normal(size=(4, 12)),
        text=meaning @ generator.normal(size=(4, 7)),
    )
    words = ["train", "features", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run"), "--methods", "gap"]
    words += ["--data.train_file", "train.npz", "--seeds", "0", "--optim.epochs", "30", "--optim.batch_size", "32"]
    assert main([*words, "--model.embed_dim", "8", "--run.threads", "1"]) == 0
    experiment = load_experiment(tmp_path / "run")
    metrics = experiment.runs[0].metrics
    assert metrics["image_to_text/R@1"] > 0.3  # 24 samples
    assert "v_measure" not in metrics  # there are no classes, in the table and figures neither
    assert "V-measure ↑" not in table_rows(summarise(experiment))[0]
    assert not any("class" in plot.name or "v-measure" in plot.name for plot in draw_plots(experiment))


# Micro-batches


def gradients_of_first_step(tmp_path: Path, small_config: Any, micro_batch_size: int | None) -> list[torch.Tensor]:
    """Return the parameters' gradients after one step of the trainer, without dropout, in float64."""
    config = small_config(
        optim__batch_size=64, optim__micro_batch_size=micro_batch_size, model__encoders__text__dropout=0.0
    )
    trainer = Trainer(config, "gap", 0, load_dataset(config.data), tmp_path / str(micro_batch_size), CPU)
    for split in (trainer.dataset.train,):
        modalities = {name: x.double() if x.is_floating_point() else x for name, x in split.modalities.items()}
        object.__setattr__(split, "modalities", modalities)
    trainer.model.double()
    trainer._record = lambda split, values: None  # type: ignore[method-assign]
    trainer._train_step(next(iter(trainer._remaining_batches())))
    return [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("micro_batch_size", [16, 24, 64, 100])
def test_micro_batches_change_no_gradient(tmp_path: Path, small_config: Any, micro_batch_size: int) -> None:
    direct = gradients_of_first_step(tmp_path, small_config, None)
    cached = gradients_of_first_step(tmp_path, small_config, micro_batch_size)
    assert len(direct) == len(cached) > 20
    for one, other in zip(cached, direct, strict=True):
        assert (one - other).norm() <= 1e-10 * max(float(other.norm()), 1e-3)


def test_training_in_micro_batches_resumes_and_learns(tmp_path: Path, small_config: Any) -> None:
    config = small_config(optim__micro_batch_size=8, optim__epochs=4)
    dataset = load_dataset(config.data)
    whole = Trainer(config, "gap", 0, dataset, tmp_path / "whole", CPU).fit()
    assert whole["metrics"]["image_to_text/R@1"] > 0.25


# Samples without a class


def test_samples_without_a_class_count_in_retrieval_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(40, 6, generator=generator) for _ in range(2))
    labels = torch.arange(40) % 3
    labels[::4] = NO_CLASS
    kept = labels != NO_CLASS
    both = {"image": image, "text": text}
    found = score(Embeddings(both, labels, torch.arange(40)), anchor="text")
    everything = score(Embeddings(both, None, torch.arange(40)), anchor="text")
    classified = score(Embeddings({name: rows[kept] for name, rows in both.items()}, labels[kept]), anchor="text")
    assert set(found) - set(everything) >= {"v_measure", "knn", "linear_probe"}
    for key, value in found.items():
        assert value == (everything if key in everything else classified)[key]


@pytest.mark.parametrize(("sizes", "expected"), [([5, 4], {"v_measure", "knn"}), ([4, 4], {"v_measure"}), ([8], set())])
def test_grouping_metrics_need_enough_samples(sizes: list[int], expected: set[str]) -> None:
    labels = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    generator = torch.Generator().manual_seed(0)
    embeddings = {name: torch.randn(len(labels), 3, generator=generator) for name in ("image", "text")}
    found = score(Embeddings(embeddings, labels), anchor="text")
    assert set(found) & {"v_measure", "knn"} == expected


def test_samples_with_a_common_source_stay_on_one_side() -> None:
    """Copies of 20 random vectors of random class: whoever finds the copies knows the class, nobody else does."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(20).repeat(10)
    labels = torch.arange(20) % 2
    embeddings = {name: torch.randn(20, 64, generator=generator)[groups] for name in ("image", "text")}
    without = score(Embeddings(embeddings, labels[groups]), anchor="text")
    found = score(Embeddings(embeddings, labels[groups], groups=groups), anchor="text")
    assert without["knn/image"] == 1.0
    splits = [knn_accuracy(embeddings["image"], labels[groups], groups=groups, seed=seed) for seed in range(5)]
    assert found["knn/image"] == pytest.approx(sum(splits) / 5)  # one split tests on four sources
    assert found["knn/image"] <= 0.75
    # Four sources per class: many samples, but too few that say something of each other.
    few = Embeddings({name: rows[groups < 8] for name, rows in embeddings.items()}, labels[groups[groups < 8]])
    assert "knn" in score(few, anchor="text")
    assert "knn" not in score(replace(few, groups=groups[groups < 8]), anchor="text")


def test_the_real_coco_images_train_and_evaluate(tmp_path: Path) -> None:
    words = ["reproduce", "--dataset", "mscoco-mini", "--data-dir", str(real_data("coco_mini")), "--methods", "gap"]
    assert main([*words, "--out", str(tmp_path), "--optim.epochs", "5", "--device", "cpu"]) == 0
    run = load_experiment(tmp_path / "batch-25").runs[0]
    # Five of the test images show objects of one category: enough to cluster, too few to classify.
    assert 0 <= run.metrics["v_measure"] <= 1
    assert "knn" not in run.metrics
    losses = [record["info_nce"] for record in run.history if record["split"] == "train"]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
