"""The Triton kernels on a GPU: large batches in every type, memory, CUDA graphs, torch.compile, determinism.

Sizes that the shared tests run over all backends are not repeated here.
"""

import pytest
import torch
from oracle import assert_matches_chunked_oracle, assert_matches_oracle, random_embeddings

from gapkernels import backends, gap_loss

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not {s.name: s.usable for s in backends.available()}["triton"],
    reason="needs a GPU that Triton compiles for",
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "dim"), [(4097, 512), (16384, 768), (65536, 128)])
def test_large_batches(n, dim, dtype):
    assert_matches_chunked_oracle(random_embeddings(n, dim, dtype=dtype), 20.0, "triton")


@pytest.mark.parametrize(("n", "dim"), [(32768, 512), (65536, 768)])
def test_peak_memory(n, dim):
    """Beyond inputs and gradients at most two copies of the inputs and 64 MiB."""
    x, y = (e.requires_grad_() for e in random_embeddings(n, dim, dtype=torch.bfloat16))
    gap_loss(x, y, backend="triton").backward()  # the library's own workspace is allocated once
    x.grad = y.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gap_loss(x, y, backend="triton").backward()
    inputs = 2 * n * dim * 2
    extra = torch.cuda.max_memory_allocated() - before - inputs
    assert extra <= 2 * inputs + 64 * 2**20, f"{extra / 2**20:.0f} MiB beside inputs of {inputs / 2**20:.0f} MiB"


@pytest.mark.parametrize("scale", [14.3, 20000.0])
def test_cuda_graph(scale):
    """Captured once, replayed on other data, with the running maximum where the data ask for it."""
    x, y = (e.requires_grad_() for e in random_embeddings(1000, 64, dtype=torch.bfloat16))
    logit_scale = torch.tensor(scale, device=x.device, requires_grad=True)

    def step():
        loss = gap_loss(x, y, logit_scale=logit_scale, backend="triton")
        return loss, *torch.autograd.grad(loss, (x, y, logit_scale))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for value, new in zip((x, y), random_embeddings(1000, 64, dtype=torch.bfloat16, seed=5), strict=True):
            value.copy_(new)
    graph.replay()
    for ours, eager in zip(captured, step(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-6)


def test_compiled_without_a_graph_break():
    x, y = (e.requires_grad_() for e in random_embeddings(500, 64, dtype=torch.bfloat16))
    compiled = torch.compile(lambda a, b: gap_loss(2 * a, b, backend="triton"), fullgraph=True)
    torch.testing.assert_close(compiled(x, y), gap_loss(2 * x, y, backend="triton"))


def test_no_synchronisation_with_the_host():
    x, y = (e.requires_grad_() for e in random_embeddings(3000, 64, dtype=torch.bfloat16))
    logit_scale = torch.tensor(14.3, device=x.device, requires_grad=True)
    gap_loss(x, y, logit_scale=logit_scale, backend="triton").backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gap_loss(x, y, logit_scale=logit_scale, backend="triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_batch_size_compiles_nothing():
    from gapkernels.backends.triton.tile_sums import tile_sums_kernel

    def run(n):
        x, y = (e.requires_grad_() for e in random_embeddings(n, 64, dtype=torch.bfloat16))
        gap_loss(x, y, backend="triton").backward()
        return sum(len(caches[0]) for caches in tile_sums_kernel.device_caches.values())

    assert run(4224) == run(4225) == run(5000) == run(4999)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_mode(dtype, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    x, y = (e.requires_grad_() for e in random_embeddings(5000, 64, dtype=dtype))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(gap_loss(x, y, backend="triton"), (x, y)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tile", range(5))
def test_every_configuration_of_the_table(tile, monkeypatch):
    """What tuning may choose has to be right as well: tensor copy engine, flattened loops, other tiles."""
    from gapkernels.backends.triton import tuning

    original = tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *key: ((options := original(*key))[tile % len(options)],))
    assert_matches_oracle(random_embeddings(1500, 200, dtype=torch.bfloat16), 14.3, "triton")
