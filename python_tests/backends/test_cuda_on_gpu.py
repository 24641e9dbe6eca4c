"""The CUDA kernels on a Hopper GPU: the shared grid in the types they take, large batches, what they promise."""

import itertools

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

from gapkernels import backends, gap_loss
from gapkernels.backends.cuda import build

pytestmark = pytest.mark.skipif(
    not {s.name: s.usable for s in backends.available()}["cuda"],
    reason="needs a Hopper GPU, nvcc and CUTLASS's headers",
)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("dim", [1, 7, 64, 100, 512, 768, 1024])
@pytest.mark.parametrize("n", [2, 3, 127, 128, 129, 1000, 4097])
def test_sizes_scales_and_types(n, dim, scale, dtype):
    assert_matches_oracle(random_embeddings(n, dim, dtype=dtype), scale, "cuda")


VARIANTS = ["streamed", "resident", "wide"]


@pytest.fixture
def variant(request, monkeypatch):
    """One of the kernels' variants, whatever the tables say."""
    monkeypatch.setenv("GAPKERNELS_CUDA_VARIANT", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 64, 100, 384, 512, 768])
@pytest.mark.parametrize("n", [2, 127, 129, 1000, 4097, 9000])
@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
def test_variants(variant, n, dim, dtype):
    """Where rows stay, panels of one tile and of many, whole strips and shares of them; 768 is too long.

    Tiles of one step, so that the two consumers of a wide one may be a tile apart, and of more than there are stages.
    """
    assert_matches_oracle(random_embeddings(n, dim, dtype=dtype), 14.3, "cuda")


@pytest.mark.parametrize("dim", [64, 512])
@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
def test_variants_give_the_same_every_time(variant, dim):
    """Copies, products and hand-overs race under another load each time; only the order of sums may differ."""
    x, y = (e.requires_grad_() for e in random_embeddings(9000, dim, dtype=torch.bfloat16))
    results = [torch.autograd.grad(gap_loss(x, y, backend="cuda"), (x, y)) for _ in range(50)]
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert (ours.double() - first.double()).norm() <= 1e-3 * first.double().norm()


PRODUCTS = ["library", "triton", "cuda"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [4096, 1000, 264])
@pytest.mark.parametrize("dim", [8, 100, 256, 768])
@pytest.mark.parametrize("n", [2, 129, 1000, 4500])
@pytest.mark.parametrize("whose", PRODUCTS)
def test_products(monkeypatch, whose, n, dim, block, dtype):
    """Whole tiles, which overwrite, and parts of them, which are added; blocks that end within a tile."""
    monkeypatch.setenv("GAPKERNELS_PRODUCTS", whose)
    monkeypatch.setenv("GAPKERNELS_GRADIENT_BLOCK", str(block))
    assert_matches_oracle(random_embeddings(n, dim, 3, dtype=dtype), 14.3, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 256, 264, 512, 768])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (127, 4096), (300, 300), (4096, 4096), (4096, 2817)])
def test_products_of_a_block(rows, cols, dim, dtype):
    """Added to what is there, or put in its place; either one alone; what lies past edges does not count."""
    build.load()
    generator = torch.Generator(device="cuda").manual_seed(0)

    def inside(values):
        height, width = values.shape
        room = values.new_full((height + 5, width + 24 - width % 8), torch.nan)
        room[:height, :width] = values
        return room[:height, :width]

    def normal(*shape):
        return inside(torch.randn(shape, generator=generator, device="cuda").to(dtype))

    h, y, x = normal(rows, cols), normal(cols, dim), normal(rows, dim)
    products = h.double() @ y.double(), h.double().T @ x.double()
    sizes = (cols**0.5, rows**0.5)  # of a number
    for first, first_cols, with_rows, with_cols in itertools.product([True, False], repeat=4):
        sides = ((first, with_rows, rows), (first_cols, with_cols, cols))
        rooms = [
            torch.full((n + 3, dim + 8), torch.nan if overwritten else 3.0, device="cuda")
            for overwritten, _, n in sides
        ]
        totals = [room[:n, :dim] if wanted else None for room, (_, wanted, n) in zip(rooms, sides, strict=True)]
        torch.ops.gapkernels_cuda.both_products(h, y, x, *totals, first, first_cols)
        for room, total, product, size, (overwritten, _, n) in zip(rooms, totals, products, sizes, sides, strict=True):
            outside = torch.ones_like(room, dtype=torch.bool)
            if total is not None:
                expected = product if overwritten else 3.0 + product
                torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-3 * size)
                outside[:n, :dim] = False
            left = room[outside]
            assert left.isnan().all() if overwritten else (left == 3.0).all()


@pytest.mark.parametrize("modalities", [3, 6])
@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
def test_variants_of_many_matrices(variant, modalities):
    assert_matches_oracle(random_embeddings(1100, 512, modalities, dtype=torch.bfloat16), 9.0, "cuda", pairs="all")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", ["anchor", "all"])
@pytest.mark.parametrize(("modalities", "anchor"), [(2, 1), (3, 1), (6, 0)])
def test_modalities_and_options(modalities, anchor, pairs, dtype):
    for normalize, normalize_centroids in itertools.product([True, False], repeat=2):
        assert_matches_oracle(
            [e if normalize else e / 4 for e in random_embeddings(300, 40, modalities, dtype=dtype)],
            9.0,
            "cuda",
            anchor=anchor,
            pairs=pairs,
            normalize=normalize,
            normalize_centroids=normalize_centroids,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "dim"), [(16384, 768), (65536, 128)])
def test_large_batches(n, dim, dtype):
    assert_matches_chunked_oracle(random_embeddings(n, dim, dtype=dtype), 20.0, "cuda")


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_sums_below_the_range_of_the_constant_exponent(scale):
    x, y = random_embeddings(600, 8)
    x, y = x[:1] + 0.04 * x, -x[:1] + 0.04 * y
    loss = max(TOLERANCE[torch.float16].loss, 4 * scale * torch.finfo(torch.float32).eps)
    assert_matches_oracle([x.half(), y.half()], scale, "cuda", Tolerance(loss, 4e-3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "dim"), [(2000, 512), (4097, 768)])
def test_cosines_near_one_at_the_largest_scale(n, dim, dtype):
    """Tensor cores cut off where they add; positives and negatives must not be cut off differently."""
    assert_matches_oracle(trained_embeddings(n, dim, dtype=dtype), 100.0, "cuda")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_in_not_a_number_out(bad):
    x, y = random_embeddings(700, 64, dtype=torch.bfloat16)
    x[333, 5] = bad
    x.requires_grad_()
    loss = gap_loss(x, y, backend="cuda")
    loss.backward()
    assert not torch.isfinite(loss)
    assert not torch.isfinite(x.grad).all()


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize(("n", "dim"), [(129, 64), (1000, 512), (6000, 512)])
def test_entries_kept_agree_with_those_made_again(variant, n, dim):
    """Stored by the kernel of the sums, read by Triton's of the gradient; one block and several."""
    x, y = (e.requires_grad_() for e in random_embeddings(n, dim, dtype=torch.bfloat16))
    gradients = [
        torch.autograd.grad(gap_loss(x, y, logit_scale=50.0, keep_similarities=keep, backend="cuda"), (x, y))
        for keep in (True, False)
    ]
    for kept, again in zip(*gradients, strict=True):
        assert (kept.double() - again.double()).norm() <= TOLERANCE[torch.bfloat16].gradient * again.double().norm()


def test_agrees_with_triton_closely():
    """Both round the same operands and weights; only the order of sums differs."""
    x, y = (e.requires_grad_() for e in random_embeddings(5000, 512, dtype=torch.bfloat16))
    results = []
    for backend in ("cuda", "triton"):
        loss = gap_loss(x, y, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (x, y))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    for ours, others in zip(results[0][1:], results[1][1:], strict=True):
        assert (ours.double() - others.double()).norm() <= 1e-3 * others.double().norm()


def test_cuda_graph():
    """Captured once, replayed on other data."""
    x, y = (e.requires_grad_() for e in random_embeddings(3000, 128, dtype=torch.bfloat16))

    def step():
        loss = gap_loss(x, y, backend="cuda")
        return loss, *torch.autograd.grad(loss, (x, y))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for value, new in zip((x, y), random_embeddings(3000, 128, dtype=torch.bfloat16, seed=5), strict=True):
            value.copy_(new)
    graph.replay()
    for ours, eager in zip(captured, step(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=2**-6 if ours.dtype == torch.bfloat16 else 1e-3, atol=1e-6)


def test_deterministic_mode(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    x, y = (e.requires_grad_() for e in random_embeddings(5000, 64, dtype=torch.bfloat16))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(gap_loss(x, y, backend="cuda"), (x, y)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_on_another_stream():
    """Kernels run on torch's current stream: work queued there before them is waited for."""
    x, y = random_embeddings(4000, 256, dtype=torch.bfloat16)
    expected = gap_loss(x, y, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        loss = gap_loss(late, y, backend="cuda")
    stream.synchronize()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
