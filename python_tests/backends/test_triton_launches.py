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
from gapkernels.backends.triton import (
    backend,
    device,
    gradient_rows,
    log_sums,
    row_backward,
    row_gradients,
    row_statistics,
    tile_sums,
    tuning,
)


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
    for module in (device, gradient_rows, tile_sums, log_sums, row_gradients, row_statistics):
        monkeypatch.setattr(module, "num_processors", lambda device: 132)
    for module in (device, tuning):
        monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(backend, "add_product", lambda total, left, right: recorded.append(("product", "", "")))
    return recorded


def evaluate(n, dim=32, dtype=torch.bfloat16, modalities=2, needs_grad=(True, True, True), world=None):
    embeddings = random_embeddings(n, dim, modalities, dtype=dtype)
    scale = torch.tensor(14.3)
    implementation, spec, world = triton.create(), LossSpec(), world or World()
    saved = plan.forward(embeddings, scale, spec, implementation, world).saved
    upstream = torch.ones(3, dtype=torch.float64)
    plan.backward(upstream, embeddings, scale, saved, spec, implementation, world, list(needs_grad))


@pytest.mark.parametrize("backward", ["rows", "blocks"])
def test_another_batch_size_compiles_nothing(launches, monkeypatch, backward):
    """Even sizes, odd ones, one block of gradients or several: the same kernels."""
    monkeypatch.setenv("GAPKERNELS_BACKWARD", backward)
    keys = []
    for n in (4224, 4225, 8191, 12288):
        launches.clear()
        evaluate(n)
        keys.append(set(launches))
    for other in keys[1:]:
        assert other ^ keys[0] == set()


def test_number_of_launches_by_blocks(launches, monkeypatch):
    """Small batches are bound by launches: 7 kernels forward; 8 and 3 library products backward."""
    monkeypatch.setenv("GAPKERNELS_BACKWARD", "blocks")
    evaluate(4000)
    names = [name for name, _, _ in launches]
    assert names.count("product") == 3
    assert len(names) == 7 + 10 + 3, names
    assert names.count("tile_sums_kernel") == 1  # the pair and the triangle


def test_number_of_launches_by_rows(launches, monkeypatch):
    """Both modalities and the centroids in one launch, and as many modalities as there are."""
    monkeypatch.setenv("GAPKERNELS_BACKWARD", "rows")
    for modalities in (2, 4):
        launches.clear()
        evaluate(4000, modalities=modalities, needs_grad=(True,) * (modalities + 1))
        names = [name for name, _, _ in launches][7:]
        assert names == [
            "row_statistics_kernel",
            "centroids_kernel",
            "pair_weights_kernel",
            "operands_kernel",
            "gradient_rows_kernel",
            *["row_gradients_kernel"] * modalities,
            "scale_gradient_kernel",
        ]


def test_many_rows_are_walked_in_parts(launches, monkeypatch):
    """Where float32 products of all would take too much memory: centroids, then each modality."""
    monkeypatch.setenv("GAPKERNELS_BACKWARD", "rows")
    monkeypatch.setattr(row_backward, "PRODUCT_BYTES", 3000 * 4 * 32)
    evaluate(4000)
    names = [name for name, _, _ in launches]
    assert names.count("gradient_rows_kernel") == 1 + 2 * 2
    assert names.count("row_gradients_kernel") == 2 * 2


class TwoProcesses(World):
    size = 2

    def gather_rows(self, x):
        return torch.cat([x, x])

    def sum_own_rows(self, x):
        return x[: len(x) // 2]


@pytest.mark.parametrize(
    ("n", "dim", "dtype", "world", "expected"),
    [
        (65536, 64, torch.bfloat16, None, "rows"),  # short rows: H would cost more than the operations it saves
        (512, 256, torch.float16, None, "rows"),  # few rows: launches
        (256, 128, torch.bfloat16, None, "rows"),  # so few that the loss takes centroids in float32, which do not fit
        (65536, 256, torch.bfloat16, None, "blocks"),
        (512, 512, torch.bfloat16, None, "blocks"),  # does not fit
        (65536, 64, torch.float32, None, "blocks"),  # operations outside of the tensor cores
        (4096, 64, torch.bfloat16, TwoProcesses(), "blocks"),  # not square
    ],
)
def test_plan_of_the_backward_pass(launches, n, dim, dtype, world, expected):
    evaluate(n, dim, dtype, world=world)
    names = {name for name, _, _ in launches}
    assert ("gradient_rows_kernel" in names) == (expected == "rows")
    assert ("gradient_tiles_kernel" in names) == (expected == "blocks")


def test_unknown_plan_is_refused(launches, monkeypatch):
    monkeypatch.setenv("GAPKERNELS_BACKWARD", "columns")
    with pytest.raises(ValueError, match="must be 'rows', 'blocks' or empty, got 'columns'"):
        evaluate(40)


def test_gradients_nobody_needs_are_not_computed(launches, monkeypatch):
    monkeypatch.setenv("GAPKERNELS_BACKWARD", "blocks")
    evaluate(4000, needs_grad=(True, False, False))
    names = [name for name, _, _ in launches]
    assert names.count("product") == 2  # one of the centroids, one of the pair
    assert names.count("row_gradients_kernel") == 1
