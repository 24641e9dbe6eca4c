"""Several processes train one model: the numbers of one process, one log, one end."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gapkernels.cli import main
from gapkernels.errors import SharedError, Stopped
from gapkernels.training import experiment
from gapkernels.training.checkpoint import load_checkpoint
from gapkernels.training.config import Config, dump_config, read_config
from gapkernels.training.experiment import run_experiment
from gapkernels.training.layout import CHECKPOINT, METRICS, RESULT, run_folder
from gapkernels.training.loop import Trainer
from gapkernels.training.processes import Processes, training_processes

METHODS = ("gap",)
STEPS = 16


def records(folder: Path, method: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder(folder, method, 0) / METRICS).read_text().splitlines()]


def result(folder: Path, method: str) -> dict[str, Any]:
    return json.loads((run_folder(folder, method, 0) / RESULT).read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(rank: int, size: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def back_to(step: int, finished: Path, folder: Path) -> Path:
    """Copy an experiment as it was behind a step."""
    shutil.copytree(finished, folder)
    for method in METHODS:
        run = run_folder(folder, method, 0)
        (run / RESULT).unlink()
        shutil.copyfile(run / f"checkpoint-{step:09d}.pt", run / CHECKPOINT)
    return folder


def in_each_process(rank: int, folder: Path, ports: tuple[int, int, int]) -> None:
    torch.set_num_threads(1)
    config = read_config(folder / "config.yaml")
    join(rank, 4, ports[0])
    with training_processes("cpu") as processes:
        run_experiment(config, folder / "four", METHODS, device="cpu")
        check_refusals(config, folder, processes)
    join(rank, 4, ports[1])
    with training_processes("cpu") as processes:
        # Behind step 6, another four: every bit as it was.
        here = processes.on_first(lambda: back_to(6, folder / "four", folder / "four-again"))
        run_experiment(config, here, METHODS, device="cpu")
    if rank > 1:
        return
    join(rank, 2, ports[2])
    with training_processes("cpu") as processes:
        run_experiment(config, folder / "two", METHODS, device="cpu")
        here = processes.on_first(lambda: back_to(6, folder / "four", folder / "four-then-two"))
        run_experiment(config, here, METHODS, device="cpu")
        stop_and_go_on(config, folder / "stopped", processes)


def check_refusals(config: Config, folder: Path, processes: Processes) -> None:
    uneven = config.model_copy(update={"optim": config.optim.model_copy(update={"batch_size": 30})})
    with pytest.raises(
        SharedError, match=r"optim\.batch_size must be a multiple of the number of processes, 4, got 30"
    ):
        run_experiment(uneven, folder / "uneven", METHODS, device="cpu")

    def unreadable(*_: Any) -> None:
        raise OSError("no such disk")

    load = experiment.load_dataset
    if processes.rank == 2:
        experiment.load_dataset = unreadable
    try:
        with pytest.raises(
            (SharedError, OSError), match="no such disk" if processes.rank == 2 else "process 2: OSError"
        ):
            run_experiment(config, folder / "unreadable", METHODS, device="cpu")
    finally:
        experiment.load_dataset = load
    assert not (folder / "unreadable").exists()


def stop_and_go_on(config: Config, folder: Path, processes: Processes) -> None:
    """SIGTERM reaches the second process only; both stop behind one step, and go on as if nothing had happened."""
    train_step = Trainer._train_step

    def terminated(trainer: Trainer, samples: torch.Tensor) -> dict[str, float]:
        logged = train_step(trainer, samples)
        if trainer.step == 3 and processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return logged

    Trainer._train_step = terminated
    try:
        with pytest.raises(Stopped, match="stopped behind step 4"):
            run_experiment(config, folder, ["gap"], device="cpu")
    finally:
        Trainer._train_step = train_step
    if processes.is_first:
        assert load_checkpoint(run_folder(folder, "gap", 0) / CHECKPOINT)["step"] == 4
    run_experiment(config, folder, ["gap"], device="cpu")


@pytest.fixture(scope="module")
def trainings(small_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same experiment by one process, by two and by four, with dropout, in micro-batches of 8."""
    folder = tmp_path_factory.mktemp("processes")
    config = small_config(
        seeds=[0],
        data__test_samples=61,  # shared unevenly
        methods__gap__learn_temperature=True,
        optim__precision="fp64",
        optim__batch_size=32,
        optim__micro_batch_size=8,
        optim__epochs=2,
        run__log_every=1,
        run__checkpoint_every=6,
        run__keep_checkpoints=3,
    )
    (folder / "config.yaml").write_text(dump_config(config))
    run_experiment(config, folder / "one", METHODS, device="cpu")
    mp.spawn(in_each_process, args=(folder, tuple(free_port() for _ in range(3))), nprocs=4)
    return folder


@pytest.mark.parametrize("several", ["two", "four", "four-again", "four-then-two"])
def test_any_number_of_processes_trains_the_same_curve(trainings: Path, several: str) -> None:
    expected, actual = records(trainings / "one", "gap"), records(trainings / several, "gap")
    assert [r["step"] for r in actual] == [r["step"] for r in expected]
    assert sum(r["split"] == "train" for r in actual) == STEPS
    for a, b in zip(actual, expected, strict=True):
        assert a.pop("split") == b.pop("split")
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)
    assert result(trainings / several, "gap")["processes"] == (2 if "two" in several else 4)


def test_the_same_number_of_processes_goes_on_bit_by_bit(trainings: Path) -> None:
    assert records(trainings / "four-again", "gap") == records(trainings / "four", "gap")
    weights = [
        load_checkpoint(run_folder(trainings / name, "gap", 0) / CHECKPOINT)["model"] for name in ("four", "four-again")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_stopped_training_goes_on(trainings: Path) -> None:
    assert records(trainings / "stopped", "gap") == records(trainings / "two", "gap")


def test_the_newest_checkpoints_are_kept(trainings: Path) -> None:
    run = run_folder(trainings / "one", "gap", 0)
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == [
        f"checkpoint-{step:09d}.pt" for step in (6, 12, 16)
    ]


def test_sigterm_leaves_a_checkpoint_and_exit_code_143(
    small_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    train_step = Trainer._train_step

    def terminated(trainer: Trainer, samples: torch.Tensor) -> dict[str, float]:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, samples)

    (tmp_path / "small.yaml").write_text(dump_config(small_config()))
    monkeypatch.setattr(Trainer, "_train_step", terminated)
    command = ["train", "digits", "--config", str(tmp_path / "small.yaml"), "--methods", "gap", "--out"]
    assert main([*command, str(tmp_path / "run"), "--device", "cpu"]) == 143
    assert "stopped behind step 3; the same command goes on from there" in capsys.readouterr().err
    assert load_checkpoint(run_folder(tmp_path / "run", "gap", 0) / CHECKPOINT)["step"] == 3


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "digits", "--device", "cpu"]) == 2
    message = "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT not set: start several processes with torchrun"
    assert message in capsys.readouterr().err
    assert not dist.is_initialized()
