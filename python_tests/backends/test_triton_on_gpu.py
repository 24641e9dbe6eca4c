"""The Triton kernels on a GPU: large batches in every type, memory, CUDA graphs, torch.compile, determinism.

Sizes that the shared tests run over all backends are not repeated here.
"""

import pytest
import torch
import torch.nn.functional as F
from oracle import TOLERANCE, assert_matches_oracle, random_embeddings

from gapkernels import backends, gap_loss

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not {s.name: s.usable for s in backends.available()}["triton"],
    reason="needs a GPU that Triton compiles for",
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def chunked_oracle(x, y, scale, chunk=2048):
    """Loss and gradients of two modalities in float64, a block of rows of each N×N matrix at a time."""
    n = len(x)
    x, y = (e.detach().double().requires_grad_() for e in (x, y))
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    c = F.normalize((u + v) / 2, dim=1)
    # Leaves of their own, so that every block can be differentiated and freed by itself.
    u_leaf, v_leaf, c_leaf = (e.detach().requires_grad_() for e in (u, v, c))
    with torch.no_grad():
        rows = [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
        col_log = torch.full((n,), -torch.inf, dtype=torch.float64, device=x.device)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for row in rows:
            col_log = torch.logaddexp(col_log, torch.logsumexp(scale * u[row] @ v.T, dim=0))
            squared = (2 - 2 * c[row] @ c.T).clamp_min(0)
            total += torch.exp(-2 * squared).sum()
        total -= n
    loss = (2 - 2 * (u * v).sum(1)).mean().detach() + torch.log(total / (n * (n - 1)))
    loss += (col_log - scale * (u * v).sum(1)).mean().detach() / 2
    for row in rows:
        logits = scale * u_leaf[row] @ v_leaf.T
        index = torch.arange(row.start, row.stop, device=x.device)
        by_row = F.cross_entropy(logits, index, reduction="sum") / (2 * n)
        loss += by_row.detach()
        weights = torch.exp(logits.detach() - col_log)
        by_col = (weights * logits).sum() / (2 * n) - logits.diagonal(row.start).sum() / (2 * n)
        potential = torch.exp(-2 * (2 - 2 * c_leaf[row] @ c_leaf.T))
        potential = potential.sum() - potential.diagonal(row.start).sum()
        (by_row + by_col + potential / total).backward()
    ((2 - 2 * (u_leaf * v_leaf).sum(1)).mean()).backward()
    # |c|² = 1: the potential above leaves the norms out, whose gradient is radial and vanishes in the normalisation.
    torch.autograd.backward([u, v, c], [u_leaf.grad, v_leaf.grad, c_leaf.grad])
    return loss.item(), x.grad, y.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "dim"), [(4097, 512), (16384, 768), (65536, 128)])
def test_large_batches(n, dim, dtype):
    embeddings = random_embeddings(n, dim, dtype=dtype)
    loss_scale = float(n) if dtype == torch.float16 else 1.0
    ours = [e.clone().requires_grad_() for e in embeddings]
    loss = gap_loss(*ours, logit_scale=20.0, backend="triton")
    (loss * loss_scale).backward()
    expected, *gradients = chunked_oracle(*embeddings, 20.0)
    assert abs(loss.item() - expected) <= TOLERANCE[dtype].loss * abs(expected)
    for e, gradient in zip(ours, gradients, strict=True):
        error = (e.grad.double() / loss_scale - gradient).norm() / gradient.norm()
        assert error <= TOLERANCE[dtype].gradient, error


def test_chunked_oracle_is_the_definition():
    x, y = random_embeddings(70, 16, dtype=torch.float64)
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    loss = gap_loss(*leaves, logit_scale=20.0, backend="reference")
    loss.backward()
    value, gradient_x, gradient_y = chunked_oracle(x, y, 20.0, chunk=32)
    assert abs(value - loss.item()) < 1e-10
    torch.testing.assert_close(gradient_x, leaves[0].grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gradient_y, leaves[1].grad, rtol=1e-8, atol=1e-12)


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
