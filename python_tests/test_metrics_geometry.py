"""Gap, cosines and uniformity against their direct definitions in float64."""

import math
from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from gapkernels import metrics
from gapkernels.metrics import _inputs

SHAPES = [(2, 1), (3, 7), (64, 5), (65, 64), (200, 33)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def rows(shape: tuple[int, int], seed: int, kind: str = "cone", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Test embeddings that are not normalised, of every degenerate kind."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "cone":
        x[:, 0] += 2
    elif kind == "duplicates":
        x[1::2] = x[0]
    elif kind == "collapsed":
        x = x[:1].expand(shape)
    elif kind == "opposite":
        x = x[:1] * torch.tensor([1.0, -1.0], dtype=x.dtype).repeat(shape[0])[: shape[0], None]
    elif kind == "zero row":
        x[0] = 0
    elif kind == "tiny":
        x = x * 1e-5
    return x.to(dtype)


KINDS = ["cone", "duplicates", "collapsed", "opposite", "zero row", "tiny"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_inputs, "TILE", 64)  # so that the shapes above have several tiles, and ragged ones
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products only wait for each other, above all when tests run in parallel
    yield
    torch.set_num_threads(threads)


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x.double(), dim=1)


def direct_gap(*embeddings: torch.Tensor) -> float:
    pairs = list(combinations([unit(x).mean(dim=0) for x in embeddings], 2))
    return sum(torch.dist(x, y).item() for x, y in pairs) / len(pairs)


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def direct_distribution_gap(*embeddings: torch.Tensor) -> float:
    covariances = [torch.cov(unit(x).T, correction=0).reshape(x.shape[1], x.shape[1]) for x in embeddings]
    gaps = []
    for x, y in combinations(covariances, 2):
        squared = torch.trace(x + y - 2 * root(root(x) @ y @ root(x))).item()
        gaps.append(math.sqrt(max(squared, 0)))
    return sum(gaps) / len(gaps)


def direct_true_pair_cosine(*embeddings: torch.Tensor) -> float:
    pairs = list(combinations([unit(x) for x in embeddings], 2))
    return sum((x @ y.T).diagonal().mean().item() for x, y in pairs) / len(pairs)


def direct_within_cosine(x: torch.Tensor) -> float:
    cosines = unit(x) @ unit(x).T
    return cosines[~torch.eye(len(x), dtype=torch.bool)].mean().item()


def direct_uniformity(x: torch.Tensor, t: float) -> float:
    return torch.pdist(unit(x)).square().mul(-t).exp().mean().log().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_direct_definition(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    x, y, z = (rows(shape, seed, kind, dtype) for seed in range(3))
    assert metrics.modality_gap(x, y) == pytest.approx(direct_gap(x, y), rel=1e-12, abs=1e-12)
    assert metrics.modality_gap(x, y, z) == pytest.approx(direct_gap(x, y, z), rel=1e-12, abs=1e-12)
    # Roots of eigenvalues that are zero up to rounding: the definition is the coarser one.
    assert metrics.distribution_gap(x, y) == pytest.approx(direct_distribution_gap(x, y), rel=1e-5, abs=1e-6)
    assert metrics.distribution_gap(x, y, z) == pytest.approx(direct_distribution_gap(x, y, z), rel=1e-5, abs=1e-6)
    assert metrics.true_pair_cosine(x, y) == pytest.approx(direct_true_pair_cosine(x, y), rel=1e-12, abs=1e-12)
    assert metrics.true_pair_cosine(x, y, z) == pytest.approx(direct_true_pair_cosine(x, y, z), rel=1e-12, abs=1e-12)
    assert metrics.within_modality_cosine(x) == pytest.approx(direct_within_cosine(x), rel=1e-12, abs=1e-12)
    for t in (0.5, 2.0, 20.0):
        assert metrics.uniformity(x, t) == pytest.approx(direct_uniformity(x, t), rel=1e-12, abs=1e-12)


def test_default_sharpness_is_two() -> None:
    x = rows((50, 8), 0)
    assert metrics.uniformity(x) == pytest.approx(direct_uniformity(x, 2.0), rel=1e-12)


def test_values_known_by_hand() -> None:
    east, north = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 5.0]] * 3)
    assert metrics.modality_gap(east, north) == pytest.approx(math.sqrt(2))
    assert metrics.modality_gap(east, -east) == pytest.approx(2.0)
    assert metrics.true_pair_cosine(east, -7 * east) == -1.0
    assert metrics.within_modality_cosine(north) == 1.0
    assert metrics.uniformity(north) == 0.0


def test_gaps_of_centroids_and_of_distributions_are_two_things() -> None:
    spread = F.normalize(torch.randn(300, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    height = torch.full((300, 1), 0.8, dtype=torch.float64)
    above, below = torch.cat([0.6 * spread, height], dim=1), torch.cat([0.6 * spread, -height], dim=1)
    assert metrics.modality_gap(above, below) == pytest.approx(1.6)
    assert metrics.distribution_gap(above, below) == pytest.approx(0, abs=1e-7)
    along, across = torch.zeros(2, 4, 6)
    along[:, 0], across[:, 1] = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert metrics.modality_gap(along, across) == 0
    assert metrics.distribution_gap(along, across) == pytest.approx(math.sqrt(2))
    assert metrics.distribution_gap(along, along.flip(0)) == pytest.approx(0, abs=1e-7)
    # Two parts of one squared distance: of the Gaussians with the moments of the rows.
    x, y = rows((200, 5), 0), rows((200, 5), 1, "zero row")
    cov_x, cov_y = (torch.cov(unit(v).T, correction=0) for v in (x, y))
    mean_x, mean_y = unit(x).mean(dim=0), unit(y).mean(dim=0)
    frechet = (mean_x - mean_y).square().sum() + torch.trace(
        cov_x + cov_y - 2 * root(root(cov_x) @ cov_y @ root(cov_x))
    )
    both = metrics.modality_gap(x, y) ** 2 + metrics.distribution_gap(x, y) ** 2
    assert both == pytest.approx(frechet.item(), rel=1e-9)


def test_uniformity_at_a_sharpness_whose_terms_underflow() -> None:
    x = rows((150, 16), 0)
    t = 1e5  # exp(−1e5·d²) is 0 in float64 for every pair
    exponents = -t * torch.pdist(unit(x)).square()
    expected = torch.logsumexp(exponents, dim=0).item() - math.log(150 * 149 / 2)
    assert not exponents.exp().any()
    assert metrics.uniformity(x, t) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_gradients_do_not_matter(dtype: torch.dtype) -> None:
    plain = rows((70, 12), 0, dtype=dtype)
    strided = plain.T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous()
    other = rows((70, 12), 1, dtype=dtype)
    for measure in (metrics.modality_gap, metrics.distribution_gap, metrics.true_pair_cosine):
        assert measure(strided, other) == pytest.approx(measure(plain, other), rel=1e-12)
    for measure in (metrics.within_modality_cosine, metrics.uniformity):
        assert measure(strided) == pytest.approx(measure(plain), rel=1e-12)


@pytest.mark.parametrize("measure", [metrics.modality_gap, metrics.distribution_gap, metrics.true_pair_cosine])
def test_errors_of_measures_over_modalities(measure) -> None:
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"`embeddings` must be at least 2 tensors, one per modality, got 1"):
        measure(x)
    with pytest.raises(
        ValueError, match=r"`embeddings\[1\]` must have the shape of `embeddings\[0\]`, \[4, 3\], got sh"
    ):
        measure(x, torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"`embeddings\[2\]` must be \[N, D\] .* got shape \[4\]"):
        measure(x, x, torch.ones(4))
    with pytest.raises(ValueError, match=r"`embeddings\[0\]` must be \[N, D\] with N >= 1 .* got shape \[0, 3\]"):
        measure(torch.ones(0, 3), torch.ones(0, 3))
    with pytest.raises(TypeError, match=r"`embeddings\[1\]` must be a floating point tensor .* got dtype torch.int64"):
        measure(x, torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"`embeddings\[0\]` must be a floating point tensor .* got list"):
        measure([[1.0]], x)
    with pytest.raises(
        ValueError, match=r"`embeddings\[1\]` must be on the device of `embeddings\[0\]`, cpu, got meta"
    ):
        measure(x, torch.ones(4, 3, device="meta"))
    spoilt = x.clone()
    spoilt[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"`embeddings\[1\]` must be finite, got NaN in row 2"):
        measure(x, spoilt)
    spoilt[2, 1] = -math.inf
    with pytest.raises(ValueError, match=r"`embeddings\[0\]` must be finite, got an infinite value in row 2"):
        measure(spoilt, x)


@pytest.mark.parametrize("measure", [metrics.within_modality_cosine, metrics.uniformity])
def test_errors_of_measures_of_one_modality(measure) -> None:
    with pytest.raises(ValueError, match=r"`embedding` must have at least 2 rows, got shape \[1, 3\]"):
        measure(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"`embedding` must be \[N, D\] .* got shape \[2, 3, 4\]"):
        measure(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match=r"`embedding` must be a floating point tensor .* got dtype torch.bool"):
        measure(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`embedding` must be finite, got NaN in row 0"):
        measure(torch.full((2, 3), math.nan))


@pytest.mark.parametrize("t", [0.0, -1.0, math.nan, math.inf])
def test_sharpness_must_be_positive(t: float) -> None:
    with pytest.raises(ValueError, match=rf"`t` must be a finite number > 0, got {t}"):
        metrics.uniformity(torch.ones(2, 3), t)
