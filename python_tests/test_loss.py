"""Every backend against the float64 oracle: sizes, scales, types, modalities, options, degenerate inputs."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import DEVICE, TOLERANCE, Tolerance, assert_matches_oracle, random_embeddings

from gapkernels import gap_loss, plan
from gapkernels.backends.contract import Scalars
from gapkernels.backends.tiled import TiledBackend, tiles
from gapkernels.distributed import World
from gapkernels.spec import LossSpec

SCALES = [1.0, 14.3, 100.0]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


DIMS = [1, 7, 64, 100, 512, 768, 1024]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("n", [2, 3, 127, 128, 129])
def test_sizes_scales_and_types(backend, n, dim, scale, dtype):
    assert_matches_oracle(random_embeddings(n, dim, dtype=dtype), scale, backend)


@pytest.mark.parametrize(("dim", "dtype"), list(itertools.product(DIMS, DTYPES)), ids=str)
def test_a_thousand_rows(backend, dim, dtype):
    """Every length and type, with scales that take turns: each meets every length and every type."""
    scale = SCALES[(DIMS.index(dim) + DTYPES.index(dtype)) % len(SCALES)]
    assert_matches_oracle(random_embeddings(1000, dim, dtype=dtype), scale, backend)


@pytest.mark.parametrize(
    ("n", "dim", "scale", "dtype"), [(4097, 64, 100.0, torch.float32), (2049, 512, 14.3, torch.bfloat16)], ids=str
)
def test_more_rows_than_tiles_hold(backend, n, dim, scale, dtype):
    assert_matches_oracle(random_embeddings(n, dim, dtype=dtype), scale, backend)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("normalize_centroids", [True, False])
@pytest.mark.parametrize("pairs", ["anchor", "all"])
@pytest.mark.parametrize(("modalities", "anchor"), [(2, 0), (2, 1), (3, 1), (4, 3)])
def test_modalities_and_options(backend, modalities, anchor, pairs, normalize, normalize_centroids):
    embeddings = random_embeddings(65, 20, modalities)
    if not normalize:
        embeddings = [e / 3 for e in embeddings]
    assert_matches_oracle(
        embeddings,
        9.0,
        backend,
        anchor=anchor,
        pairs=pairs,
        normalize=normalize,
        normalize_centroids=normalize_centroids,
        uniformity_t=1.5,
    )


@pytest.mark.parametrize("weights", [w for w in itertools.product([0.0, 0.7], repeat=3) if any(w)], ids=str)
def test_weights(backend, weights):
    nce, atp, cu = weights
    assert_matches_oracle(random_embeddings(40, 12, 3), 14.3, backend, nce_weight=nce, atp_weight=atp, cu_weight=cu)


def test_all_weights_zero(backend):
    x, y = (e.requires_grad_() for e in random_embeddings(8, 4))
    loss = gap_loss(x, y, nce_weight=0, atp_weight=0, cu_weight=0, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


def degenerate(kind: str, n: int = 50, dim: int = 16) -> list[torch.Tensor]:
    x, y = random_embeddings(n, dim)
    if kind == "collapsed":
        return [x[:1].repeat(n, 1), x[:1].repeat(n, 1)]
    if kind == "nearly collapsed":
        return [x[:1] + 1e-3 * x, x[:1] + 1e-3 * y]
    if kind == "opposite poles":
        return [x, -x]
    if kind == "two poles":
        return [x[:1] + 0.01 * x, -x[:1] + 0.01 * y]
    if kind == "duplicate rows":
        return [x[torch.arange(n, device=x.device) // 5], y[torch.arange(n, device=x.device) // 5]]
    if kind == "zero rows":
        x[3], y[3], y[7] = 0, 0, 0
        return [x, y]
    if kind == "tiny and huge rows":
        x[1] *= 1e-10
        x[2] *= 1e18
        y[2] *= 1e30
        return [x, y]
    raise AssertionError(kind)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "kind",
    [
        "collapsed",
        "nearly collapsed",
        "opposite poles",
        "two poles",
        "duplicate rows",
        "zero rows",
        "tiny and huge rows",
    ],
)
def test_degenerate_inputs(backend, kind, scale):
    # The gradient of collapsed rows is a difference of nearly equal numbers, and is zero: what is left is the rounding
    # of both in float32, which a backend that subtracts the positives after the products has twice.
    tolerance = TOLERANCE[torch.float32]
    if kind == "collapsed":
        tolerance = tolerance._replace(gradient=2 * tolerance.gradient)
    assert_matches_oracle(degenerate(kind), scale, backend, tolerance)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_relative_accuracy_where_the_model_is_nearly_right(backend, noise):
    """1 − p of the positive is 1e-5 and less here; a soft-max that includes it would have lost those digits."""
    embeddings = random_embeddings(200, 256, noise=noise)
    tolerance = Tolerance(loss=2e-5, gradient=2e-5)
    assert_matches_oracle(
        embeddings, 20.0, backend, tolerance, gradient_floor=0, atp_weight=0.0, cu_weight=0.0, nce_weight=1.0
    )
    loss = gap_loss(*embeddings, logit_scale=20.0, atp_weight=0.0, cu_weight=0.0, backend=backend)
    assert 0 < loss.item() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [100.0, 1000.0, 20000.0])
def test_sums_below_the_range_of_the_constant_exponent(backend, scale, dtype):
    """Rows whose every cosine is strongly negative: their sums underflow unless the reference exponent adapts."""
    x, _ = random_embeddings(60, 8, dtype=dtype)
    y = -x[:1] + 0.3 * random_embeddings(60, 8, dtype=dtype, seed=1)[0] / 8
    x = x[:1] + 0.3 * x / 8
    # the rounding of an exponent of size s
    rounding = scale * torch.finfo(dtype).eps
    tolerance = Tolerance(*(max(t, 4 * rounding) for t in TOLERANCE[dtype]))
    assert_matches_oracle([x, y], scale, backend, tolerance)


def test_constant_exponent_would_fail_where_the_robust_path_is_tested(monkeypatch):
    """The test above is about something: without the running maximum its sums are zero."""
    x, y = random_embeddings(60, 8)
    monkeypatch.setattr(tiles, "_smallest_exact_sum", lambda matrix: 0.0)
    x, y = x[:1] + 0.01 * x, -x[:1] + 0.01 * y
    with torch.no_grad():
        wrong = gap_loss(x, y, logit_scale=1000.0, backend="torch", atp_weight=0.0, cu_weight=0.0)
    assert not torch.isfinite(wrong) or wrong.item() < 1


@pytest.mark.parametrize("t", [0.01, 2.0, 50.0, 500.0])
@pytest.mark.parametrize("normalize_centroids", [True, False])
def test_uniformity_for_any_sharpness(backend, t, normalize_centroids):
    tolerance = Tolerance(max(1e-5, t * 1e-6), max(1e-5, t * 1e-6))
    assert_matches_oracle(
        random_embeddings(70, 24, 3),
        1.0,
        backend,
        tolerance,
        nce_weight=0.0,
        uniformity_t=t,
        normalize_centroids=normalize_centroids,
    )


@pytest.mark.parametrize("length", [0.01, 1.0, 5.0])
def test_vectors_of_any_length_without_normalisation(backend, length):
    x, y = (length * torch.nn.functional.normalize(e, dim=1) for e in random_embeddings(80, 32))
    scales = torch.linspace(0.2, 1.0, 80, device=DEVICE)[:, None]
    tolerance = Tolerance(1e-5, 1e-5 * max(1.0, length**2 / 5))
    assert_matches_oracle([x * scales, y], 14.3, backend, tolerance, normalize=False)


def test_products_and_tiles(products, monkeypatch):
    """Many small tiles: partial tiles, diagonals through several tiles, both libraries of matrix products."""
    for tile, n in itertools.product((5, 8, 64), (5, 17, 24)):
        monkeypatch.setattr(tiles, "TILE", tile)
        assert_matches_oracle(random_embeddings(n, 6, 3), 14.3, "torch", pairs="all")
        x, y = random_embeddings(n, 6)
        assert_matches_oracle([x[:1] + x / 50, -x[:1] + y / 50], 300.0, "torch", Tolerance(1e-4, 1e-3))


@given(
    n=st.integers(2, 40),
    dim=st.integers(1, 24),
    modalities=st.integers(2, 4),
    scale=st.floats(0.1, 100.0),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from([3, 16, 1024]),
    pairs=st.sampled_from(["anchor", "all"]),
    normalize_centroids=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(2, 1, 2, 90.0, torch.float32, 3, "anchor", False, 252)  # every sum below the range, the gradient zero
@settings(max_examples=150, deadline=None)
def test_generated_shapes(n, dim, modalities, scale, dtype, tile, pairs, normalize_centroids, seed):
    original, tiles.TILE = tiles.TILE, tile
    try:
        embeddings = random_embeddings(n, dim, modalities, dtype, seed)
        assert_matches_oracle(embeddings, scale, "torch", pairs=pairs, normalize_centroids=normalize_centroids)
    finally:
        tiles.TILE = original


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_not_a_number_in_not_a_number_out(backend, bad, normalize):
    x, y = random_embeddings(30, 8)
    x[4, 2] = bad
    x.requires_grad_()
    loss = gap_loss(x, y, backend=backend, normalize=normalize)
    loss.backward()
    assert not torch.isfinite(loss)
    assert not torch.isfinite(x.grad).all()


def test_one_sample(backend):
    x, y = random_embeddings(1, 8)
    assert_matches_oracle([x, y], 14.3, backend, cu_weight=0.0)


def test_layouts(backend):
    x, y = random_embeddings(33, 20)
    views = [x.T.contiguous().T, torch.stack([y, y], dim=2)[:, :, 1]]
    assert not any(v.is_contiguous() for v in views)
    assert_matches_oracle(views, 14.3, backend)
    assert_matches_oracle([x[:1].expand(33, 20), y], 14.3, backend)


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3)), ids=str)
def test_gradients_only_where_they_are_needed(backend, needed):
    """Frozen towers and fixed temperatures get no gradient; what remains is unchanged."""
    embeddings = random_embeddings(50, 12)
    inputs = [*embeddings, torch.tensor(7.0, device=DEVICE)]

    def gradients(flags):
        leaves = [v.clone().requires_grad_(flag) for v, flag in zip(inputs, flags, strict=True)]
        loss = gap_loss(*leaves[:2], logit_scale=leaves[2], backend=backend)
        if any(flags):
            loss.backward()
        else:
            assert not loss.requires_grad
        return [leaf.grad for leaf in leaves]

    for part, full, flag in zip(gradients(needed), gradients((True,) * 3), needed, strict=True):
        if flag:
            torch.testing.assert_close(part, full)
        else:
            assert part is None


def test_terms_can_be_weighted_by_the_caller(backend):
    """The parts are differentiable: a schedule on the device needs no Python number."""
    weights = torch.tensor([0.3, 1.7, 0.6], device=DEVICE)
    x, y = (e.requires_grad_() for e in random_embeddings(30, 8))
    terms = gap_loss(x, y, backend=backend, return_terms=True)
    by_caller = torch.autograd.grad((weights * torch.stack(terms[1:4])).sum(), (x, y))
    nce, atp, cu = weights.tolist()
    built_in = torch.autograd.grad(
        gap_loss(x, y, nce_weight=nce, atp_weight=atp, cu_weight=cu, backend=backend), (x, y)
    )
    torch.testing.assert_close(by_caller, built_in)
    assert not terms.modality_gap.requires_grad
    assert not terms.true_pair_cosine.requires_grad


def test_two_runs_give_identical_bits(backend):
    x, y = (e.requires_grad_() for e in random_embeddings(1500, 64))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (torch.autograd.grad(gap_loss(x, y, backend=backend), (x, y)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_zero_weight_skips_the_work(monkeypatch):
    calls = []
    original = tiles.log_sums
    monkeypatch.setattr(tiles, "log_sums", lambda matrix: calls.append(matrix.symmetric) or original(matrix))
    embeddings = random_embeddings(8, 4, 3)
    for nce, cu, expected in ((1, 1, [False, False, True]), (1, 0, [False, False]), (0, 1, [True]), (0, 0, [])):
        calls.clear()
        gap_loss(*embeddings, nce_weight=nce, cu_weight=cu, backend="torch", return_terms=True)
        assert calls == expected


def test_nothing_of_size_n_squared_is_allocated(monkeypatch):
    """Every tensor the tiled backend makes is a tile or O(N·D)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n, dim = 600, 8
    monkeypatch.setattr(tiles, "TILE", 64)
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(o.numel() for o in (out if isinstance(out, list | tuple) else [out]) if hasattr(o, "numel"))
            return out

    embeddings = random_embeddings(n, dim)
    numbers = (torch.tensor(v, dtype=torch.float64, device=DEVICE) for v in (10.0, [1.0, 1.0, 1.0], 2.0))
    arguments = (embeddings, Scalars(*numbers))
    with Record():
        result = plan.forward(*arguments, LossSpec(), TiledBackend(), World())
        upstream = torch.ones(3, dtype=torch.float64, device=DEVICE)
        plan.backward(upstream, *arguments, result.saved, LossSpec(), TiledBackend(), World(), [True, True, True])
    assert max(sizes) <= max(64 * 64, 2 * n * dim) < n * n / 10


@pytest.mark.parametrize("length", [1.0, 10.0, 100.0, 1000.0])
def test_raw_centroids_far_apart(length):
    """Near copies of long vectors: in float32 ‖c_i‖² + ‖c_j‖² − 2⟨c_i, c_j⟩ loses every digit of their distance."""
    things = torch.nn.functional.normalize(random_embeddings(16, 32)[0], dim=1) * length
    x = things.repeat(4, 1) + 0.1 * random_embeddings(64, 32, seed=1)[0] / 32**0.5
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    options = {"nce_weight": 0.0, "atp_weight": 0.0, "normalize": False, "normalize_centroids": False}
    loss = gap_loss(leaf, leaf, **options)
    distances = torch.pdist(exact).square()
    expected = distances.mul(-2).exp().mean().log()
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (leaf.grad - exact.grad).norm() <= 1e-6 * exact.grad.norm()


def test_float64_rows_of_any_length(backend):
    """Squares of 1e200 leave the range of float64."""
    if backend == "triton":
        pytest.skip("takes no float64")
    x, y = random_embeddings(8, 4, dtype=torch.float64)
    expected = gap_loss(x, y, backend="reference").item()
    for length in (1e200, 1e-8):
        assert gap_loss(x * length, y, backend=backend).item() == pytest.approx(expected, rel=1e-12)
