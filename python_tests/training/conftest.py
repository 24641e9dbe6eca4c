"""Small experiments on the digits that the tests of the trainer share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits

from gapkernels.training.config import Config, load_config
from gapkernels.training.experiment import run_experiment

SMALL: dict[str, Any] = {
    "data.train_samples": 256,
    "data.test_samples": 200,
    "model.embed_dim": 16,
    "model.encoders.image.width": 8,
    "model.encoders.text.width": 16,
    "model.encoders.text.depth": 1,
    "optim.batch_size": 32,
    "optim.epochs": 3,
    "optim.lr": 5e-3,
    "run.eval_every": 1,
    "run.log_every": 3,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests run in parallel already, and these models are too small to gain from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_config() -> Callable[..., Config]:
    """Build the digits preset, made small; keyword arguments with `__` for dots change more of it."""

    def build(**changes: Any) -> Config:
        overrides = {key.replace("__", "."): value for key, value in changes.items()}
        return load_config("digits", overrides=SMALL | overrides)

    return build


@pytest.fixture(scope="session")
def finished(small_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished experiment: clip-lt and gap with seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    run_experiment(small_config(seeds=[0, 1], optim__epochs=10), folder, methods=["clip-lt", "gap"], device="cpu")
    return folder
