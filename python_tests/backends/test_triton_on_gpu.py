"""The Triton kernels on a GPU: both backward passes, large batches, memory, CUDA graphs, torch.compile, determinism.

Sizes that the shared tests run over all backends are not repeated here; those take whichever backward pass the count
says.
"""

from pathlib import Path

import pytest
import torch
from oracle import (
    TOLERANCE,
    Tolerance,
    assert_matches_chunked_oracle,
    assert_matches_oracle,
    random_embeddings,
    trained_embeddings,
)

from gapkernels import GapLoss, backends, gap_loss

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not {s.name: s.usable for s in backends.available()}["triton"],
    reason="needs a GPU that Triton compiles for",
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "cuda-graphs.md"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(
    ("n", "dim"), [(2, 1), (3, 7), (127, 64), (128, 100), (129, 128), (1000, 33), (1000, 256), (4097, 72)]
)
def test_sizes_scales_and_types(n, dim, scale, dtype):
    assert_matches_oracle(random_embeddings(n, dim, dtype=dtype), scale, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pairs", ["anchor", "all"])
def test_modalities_and_options(pairs, dtype):
    for normalize, normalize_centroids in ((True, True), (False, False)):
        embeddings = random_embeddings(300, 40, 4)
        if not normalize:
            embeddings = [e / 6 for e in embeddings]
        assert_matches_oracle(
            [e.to(dtype) for e in embeddings],
            9.0,
            "triton",
            anchor=1,
            pairs=pairs,
            normalize=normalize,
            normalize_centroids=normalize_centroids,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "dim"), [(4097, 512), (16384, 768), (32768, 256), (65536, 64), (65536, 128)])
def test_large_batches(n, dim, dtype):
    assert_matches_chunked_oracle(random_embeddings(n, dim, dtype=dtype), 20.0, "triton")


@pytest.mark.parametrize("scale", [100.0, 1000.0, 20000.0])
def test_sums_below_the_range_of_the_constant_exponent(scale):
    x, y = random_embeddings(600, 8)
    x, y = x[:1] + 0.04 * x, -x[:1] + 0.04 * y
    tolerance = Tolerance(*(max(t, 4 * scale * torch.finfo(torch.float32).eps) for t in TOLERANCE[torch.float32]))
    assert_matches_oracle([x, y], scale, "triton", tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "dim"), [(2000, 512), (4097, 768)])
def test_cosines_near_one_at_the_largest_scale(n, dim, dtype):
    """Tensor cores cut off where they add; positives and negatives must not be cut off differently."""
    assert_matches_oracle(trained_embeddings(n, dim, dtype=dtype), 100.0, "triton")


def test_log_sums_too_far_apart_for_one_exponential():
    x, y = random_embeddings(600, 8)
    x[:300], y[:300] = x[:1] + 0.01 * x[:300], -x[:1] + 0.01 * y[:300]
    assert_matches_oracle([x, y], 400.0, "triton", Tolerance(1e-4, 4e-4))


@pytest.mark.parametrize("dim", [64, 128, 200])
@pytest.mark.parametrize("place", range(5))
def test_every_configuration_of_the_table(place, dim, monkeypatch):
    """What tuning may choose has to be right as well: tensor copy engine, other tiles."""
    from gapkernels.backends.triton import tuning

    original = tuning.candidates

    def one(*key):
        options = original(*key)
        return options[place % len(options) :][:1] if options else ()

    monkeypatch.setattr(tuning, "candidates", one)
    monkeypatch.setattr(tuning, "_decided", {})
    assert_matches_oracle(random_embeddings(1500, dim, dtype=torch.bfloat16), 14.3, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("n", "dim"), [(1000, 64), (4097, 768), (6000, 512)])
def test_entries_kept_and_made_again(n, dim, keep, dtype):
    """One block and several, the last of which are parts; trained embeddings fill the upper end of the range."""
    assert_matches_oracle(random_embeddings(n, dim, dtype=dtype), 14.3, "triton", keep_similarities=keep)
    assert_matches_oracle(trained_embeddings(n, dim, dtype=dtype), 100.0, "triton", keep_similarities=keep)


def test_entries_kept_in_bfloat16_agree_with_those_made_again():
    """Without a gradient of the scale, which asks for float32."""
    x, y = (e.requires_grad_() for e in random_embeddings(6000, 512, dtype=torch.bfloat16))
    gradients = [
        torch.autograd.grad(gap_loss(x, y, logit_scale=50.0, keep_similarities=keep, backend="triton"), (x, y))
        for keep in (True, False)
    ]
    for kept, again in zip(*gradients, strict=True):
        assert (kept.double() - again.double()).norm() <= TOLERANCE[torch.bfloat16].gradient * again.double().norm()


def test_kept_entries_of_sums_below_the_range_are_not_used():
    x, y = random_embeddings(600, 8)
    x[:300], y[:300] = x[:1] + 0.01 * x[:300], -x[:1] + 0.01 * y[:300]
    assert_matches_oracle([x, y], 400.0, "triton", Tolerance(1e-4, 4e-4), keep_similarities=True)


@pytest.mark.parametrize("side", [512, 2816, 8192])
def test_sides_of_blocks(monkeypatch, side):
    """From the second block of a kind on launches are written out; of whole blocks and of their rests."""
    monkeypatch.setenv("GAPKERNELS_GRADIENT_BLOCK", str(side))
    for dtype in (torch.bfloat16, torch.float16):
        embeddings = random_embeddings(9000, 384, dtype=dtype)
        assert_matches_chunked_oracle(embeddings, 20.0, "triton")


# ---- more than 2³¹ numbers ------------------------------------------------------------------------------------------


def needs_memory(gib):
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory")


def test_rows_beyond_two_to_the_31():
    """Everything that passes over rows, on more numbers than 32 bits count; no N×N work."""
    needs_memory(48)
    n, dim, last = 2**21 + 77, 1024, 1000
    x, y = (torch.randn(n, dim, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in range(2))
    gap_loss(x, y, nce_weight=0, cu_weight=0, backend="triton").backward()
    tail = [e.detach()[-last:].double().requires_grad_() for e in (x, y)]
    u, v = (torch.nn.functional.normalize(e, dim=1) for e in tail)
    ((u - v).square().sum() / n).backward()
    for e, expected in zip((x, y), tail, strict=True):
        torch.testing.assert_close(e.grad[-last:].double(), expected.grad, rtol=1e-2, atol=1e-3 / n)


def test_columns_beyond_two_to_the_31():
    """Tiles of an operand with more numbers than 32 bits count: sums, blocks of gradients."""
    from gapkernels.backends.contract import Matrix
    from gapkernels.backends.triton.gradient_tiles import gradient_tiles
    from gapkernels.backends.triton.tile_sums import tile_sums

    needs_memory(16)
    n, dim, rows = 2**22 + 96, 256, 128
    stacked = torch.nn.functional.normalize(torch.randn(2, n, dim, dtype=torch.bfloat16, device="cuda"), dim=2)
    ones = torch.ones(2, n, device="cuda")
    scale, zero = torch.tensor(5.0, device="cuda"), torch.zeros((), device="cuda")
    tail = slice(n - rows, n)
    x = 5.0 * stacked[0, tail].double() @ stacked[1, tail].double().T

    matrix = Matrix(stacked[0, tail], ones[0, tail], stacked[1], ones[1], scale, n - rows)
    _, col_sums = tile_sums([matrix], None, 100)
    expected = torch.exp(x).fill_diagonal_(0).sum(dim=0)
    torch.testing.assert_close(col_sums[0, tail].double(), expected, rtol=1e-4, atol=0)

    h = torch.empty(rows, 256, dtype=torch.bfloat16, device="cuda")
    block = Matrix(stacked[0, tail], ones[0, tail], stacked[1, tail], ones[1, tail], scale)
    gradient_tiles(block, zero.expand(rows).clone(), zero.expand(rows).clone(), zero, 1.0, None, h)
    torch.testing.assert_close(h[:, :rows].double(), 2 * torch.exp(x).fill_diagonal_(0), rtol=1e-2, atol=1e-6)


# ---- memory, graphs, compilation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "dim"), [(32768, 512), (65536, 768), (131072, 128), (4096, 64)])
def test_peak_memory(n, dim):
    """Beyond inputs and gradients at most two copies of the inputs and 64 MiB, where no entries are kept."""
    x, y = (e.requires_grad_() for e in random_embeddings(n, dim, dtype=torch.bfloat16))
    gap_loss(x, y, keep_similarities=False, backend="triton").backward()  # the library's workspace is allocated once
    x.grad = y.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gap_loss(x, y, keep_similarities=False, backend="triton").backward()
    inputs = 2 * n * dim * 2
    extra = torch.cuda.max_memory_allocated() - before - inputs
    assert extra <= 2 * inputs + 64 * 2**20, f"{extra / 2**20:.0f} MiB beside inputs of {inputs / 2**20:.0f} MiB"


@pytest.mark.parametrize("scale", [14.3, 20000.0])
@pytest.mark.parametrize(("n", "dim"), [(1000, 64), (5000, 72)])
def test_cuda_graph(n, dim, scale):
    """Captured once, replayed on other data, with the running maximum where the data ask for it."""
    x, y = (e.requires_grad_() for e in random_embeddings(n, dim, dtype=torch.bfloat16))
    logit_scale = torch.tensor(scale, device=x.device, requires_grad=True)

    def step():
        loss = gap_loss(x, y, logit_scale=logit_scale, backend="triton")
        return loss, *torch.autograd.grad(loss, (x, y, logit_scale))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for value, new in zip((x, y), random_embeddings(n, dim, dtype=torch.bfloat16, seed=5), strict=True):
            value.copy_(new)
    graph.replay()
    for ours, eager in zip(captured, step(), strict=True):
        # Sums by atomics come in any order: a number in bf16 may end up on the other side, and one step is 2^-7 of it.
        rtol = 2**-6 if ours.dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(ours, eager, rtol=rtol, atol=1e-6)


def test_cuda_graph_of_a_training_step():
    """Encoders, loss with a learned temperature, backward pass and optimizer, as docs/cuda-graphs.md captures them."""
    code = DOCUMENT.read_text(encoding="utf-8").split("```python")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    batches = [[x.cuda() for x in random_embeddings(256, 64, seed=seed)] for seed in range(5)]

    def trained(step_of):
        torch.manual_seed(0)
        encoders = [torch.nn.Linear(64, 32, device="cuda") for _ in range(2)]
        criterion = GapLoss(learn_temperature=True, backend="triton").cuda()
        parameters = [p for module in (*encoders, criterion) for p in module.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-3, capturable=True)
        train = step_of(encoders, criterion, optimizer)
        losses = [train(*batch).item() for batch in batches]
        return losses, parameters

    def eagerly(encoders, criterion, optimizer):
        def train(*batch):
            optimizer.zero_grad()
            loss = criterion(*(encoder(x) for encoder, x in zip(encoders, batch, strict=True)))
            loss.backward()
            optimizer.step()
            return loss

        for _ in range(3):
            train(*batches[0])
        return train

    losses, parameters = trained(lambda *parts: names["captured_step"](*parts, batches[0]))
    expected_losses, expected = trained(eagerly)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parameters, expected, rtol=1e-3, atol=1e-4)


def test_repeated_steps_match_the_first():
    """From the third on launches are repeated without the plan."""
    for seed in range(5):
        for dtype in DTYPES:
            assert_matches_oracle(random_embeddings(1000, 128, dtype=dtype, seed=seed), 14.3, "triton")


def test_compiled_without_a_graph_break():
    x, y = random_embeddings(500, 64, dtype=torch.bfloat16)
    scale = torch.tensor(14.3, device=x.device)

    def loss(a, b, logit_scale):
        return gap_loss(2 * a, b, logit_scale=logit_scale, backend="triton")

    def evaluate(function):
        leaves = [e.detach().clone().requires_grad_() for e in (x, y, scale)]
        value = function(*leaves)
        return value, *torch.autograd.grad(value, leaves)

    # Gradients in bf16: whether 2·a is rounded before or after is the compiler's choice.
    for compiled, eager in zip(evaluate(torch.compile(loss, fullgraph=True)), evaluate(loss), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("fixed", [True, False])
def test_no_synchronisation_with_the_host(fixed):
    x, y = (e.requires_grad_() for e in random_embeddings(3000, 64, dtype=torch.bfloat16))
    logit_scale = 14.3 if fixed else torch.tensor(14.3, device=x.device, requires_grad=True)
    gap_loss(x, y, logit_scale=logit_scale, backend="triton").backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gap_loss(x, y, logit_scale=logit_scale, backend="triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_batch_size_compiles_nothing():
    from gapkernels.backends.triton.gradient_tiles import gradient_tiles_kernel
    from gapkernels.backends.triton.tile_sums import tile_sums_kernel

    def run(n):
        x, y = (e.requires_grad_() for e in random_embeddings(n, 64, dtype=torch.bfloat16))
        gap_loss(x, y, backend="triton").backward()
        kernels = (tile_sums_kernel, gradient_tiles_kernel)
        return [sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in kernels]

    assert run(4224) == run(4225) == run(5000) == run(4999)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_mode(dtype, monkeypatch):
    """The same bits again, and no need to set up cuBLAS for it."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    x, y = (e.requires_grad_() for e in random_embeddings(5000, 64, dtype=dtype))
    logit_scale = torch.tensor(14.3, device=x.device, requires_grad=True)

    def step():
        loss = gap_loss(x, y, logit_scale=logit_scale, backend="triton")
        return loss, *torch.autograd.grad(loss, (x, y, logit_scale))

    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(), step()
        torch.use_deterministic_algorithms(True, warn_only=True)  # the oracle does need cuBLAS
        assert_matches_oracle([x.detach(), y.detach()], 14.3, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
