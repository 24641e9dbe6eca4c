"""Fixtures that the tests of the whole package share."""

from __future__ import annotations

import os

import pytest
import torch

from gapkernels import backends
from gapkernels.backends.tiled import tiles

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers that each start a thread per core only wait for one another


def natively_tested_backends() -> list[str]:
    """The backends that compute the loss by other means than the definition and run on the device at hand.

    The CUDA backend takes 16-bit types only and has a grid of its own (``backends/test_cuda_on_gpu.py``); the CPU's
    takes no tensors of a GPU, on which the tests run where there is one.
    """
    usable = {status.name for status in backends.available() if status.usable}
    elsewhere = {"reference", "cuda"} | ({"cpu"} if torch.cuda.is_available() else set())
    return [name for name in backends.NAMES if name in usable - elsewhere]


@pytest.fixture(params=natively_tested_backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["torch.mm", "oneDNN"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both libraries that the tiled backend takes matrix products from."""
    if request.param == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(tiles, "onednn_is_faster", lambda: request.param == "oneDNN")
    return request.param
