"""What a training step costs."""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from gapkernels.training.cost import StepMeter
from gapkernels.training.data import load_dataset
from gapkernels.training.loop import Trainer
from gapkernels.training.results import load_run

CPU = torch.device("cpu")


def test_pauses_are_left_out() -> None:
    meter, began = StepMeter(CPU), time.perf_counter()
    meter.start()
    time.sleep(0.06)
    with meter.paused():
        time.sleep(0.3)
    time.sleep(0.06)
    meter.stop()
    elapsed = time.perf_counter() - began
    cost = meter.cost(2)
    assert cost is not None
    assert cost.steps == 2
    assert 0.12 <= 2 * cost.seconds <= elapsed - 0.3
    assert cost.cpu_seconds < 0.05  # to sleep takes no processor


def test_without_steps_there_is_no_cost() -> None:
    meter = StepMeter(CPU)
    meter.start()
    meter.stop()
    assert meter.cost(0) is None


def _peaks_with_and_without_a_pause(large: int) -> list[int]:
    """Peaks of a process that touches nothing, a quarter of ``large`` beside all of it in a pause, and all of it."""

    def touch(size: int) -> None:
        torch.ones(size, dtype=torch.uint8)

    def peak(counted: int, paused: int) -> int:
        meter = StepMeter(CPU)
        meter.start()
        touch(counted)
        with meter.paused():
            touch(paused)
        meter.stop()
        cost = meter.cost(1)
        assert cost is not None
        assert cost.peak_bytes is not None
        return cost.peak_bytes

    return [peak(0, 0), peak(large // 4, large), peak(large, 0)]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read on Linux")
def test_the_peak_is_that_of_the_steps() -> None:
    large = 2**29
    # A process of its own: what other tests leave to be freed would count as memory of the first steps.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        idle, with_pause, whole = process.submit(_peaks_with_and_without_a_pause, large).result()
    assert with_pause - idle == pytest.approx(large // 4, rel=0.3)
    assert whole - idle == pytest.approx(large, rel=0.3)


def test_a_run_tells_its_cost_and_a_continued_one_that_of_its_own_steps(tmp_path: Path, small_config: Any) -> None:
    config = small_config(optim__epochs=2)
    dataset = load_dataset(config.data)
    whole = tmp_path / "gap" / "seed-0"
    trainer = Trainer(config, "gap", 0, dataset, whole, CPU)
    result = trainer.fit()
    assert result["step_cost"]["steps"] == trainer.total_steps
    assert 0 < result["step_cost"]["seconds"] * trainer.total_steps < result["seconds"]
    cost = load_run(whole, config).epoch_cost
    assert cost["epoch_seconds"] == pytest.approx(result["step_cost"]["seconds"] * trainer.steps_per_epoch)

    (whole / "result.json").unlink()
    again = Trainer(config, "gap", 0, dataset, whole, CPU).fit()
    assert again["step_cost"] is None
    assert again["metrics"] == result["metrics"]
    assert load_run(whole, config).epoch_cost == {}
