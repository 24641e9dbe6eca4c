"""What the Triton launcher asks for, recorded instead of run: no GPU needed."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from oracle import random_embeddings
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from gapkernels import plan
from gapkernels.backends.triton.device import INTERPRETED
from gapkernels.distributed import World
from gapkernels.spec import LossSpec

if INTERPRETED:
    pytest.skip("kernels are interpreted in this process (TRITON_INTERPRET=1)", allow_module_level=True)

from gapkernels.backends import triton
from gapkernels.backends.triton import backend, log_sums, row_gradients, row_statistics, tile_sums, tuning


@pytest.fixture
def launches(monkeypatch):
    """Launches as (kernel, what its compilation depends on), as on an H100; nothing runs."""
    recorded = []
    target = make_backend(GPUTarget("cuda", 90, 32))

    def record(kernel, *args, grid, warmup, **kwargs):
        binder = create_function_from_signature(kernel.signature, kernel.params, target)
        _, specialization, options = binder(*args, debug=False, instrumentation_mode="", **kwargs)
        recorded.append((kernel.__name__, str(specialization), str(options)))

    monkeypatch.setattr(JITFunction, "run", record)
    for module in (tile_sums, log_sums, row_gradients, row_statistics):
        monkeypatch.setattr(module, "num_processors", lambda device: 132)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(backend, "add_product", lambda total, left, right: recorded.append(("product", "", "")))
    return recorded


def evaluate(n, dtype=torch.bfloat16, modalities=2, needs_grad=(True, True, True)):
    embeddings = random_embeddings(n, 32, modalities, dtype=dtype)
    scale = torch.tensor(14.3)
    implementation, spec, world = triton.create(), LossSpec(), World()
    saved = plan.forward(embeddings, scale, spec, implementation, world).saved
    upstream = torch.ones(3, dtype=torch.float64)
    plan.backward(upstream, embeddings, scale, saved, spec, implementation, world, list(needs_grad))


def test_another_batch_size_compiles_nothing(launches):
    """Even sizes, odd ones, one block of gradients or several: the same kernels."""
    keys = []
    for n in (4224, 4225, 8191, 12288):
        launches.clear()
        evaluate(n)
        keys.append(set(launches))
    for other in keys[1:]:
        assert other ^ keys[0] == set()


def test_number_of_launches(launches):
    """Small batches are bound by launches: 7 kernels forward; 8 and 3 library products backward."""
    evaluate(4000)
    names = [name for name, _, _ in launches]
    assert names.count("product") == 3
    assert len(names) == 7 + 8 + 3, names
    assert names.count("tile_sums_kernel") == 1  # the pair and the triangle


def test_gradients_nobody_needs_are_not_computed(launches):
    evaluate(4000, needs_grad=(True, False, False))
    names = [name for name, _, _ in launches]
    assert names.count("product") == 2  # one of the centroids, one of the pair
    assert names.count("row_gradients_kernel") == 1
