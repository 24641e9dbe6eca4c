"""The definition against the formulas written out another way: torch's own cross-entropy, pairwise distances, sums."""

import math

import pytest
import torch
import torch.nn.functional as F

from gapkernels import gap_loss


@pytest.fixture
def unit():
    generator = torch.Generator().manual_seed(1)
    return [F.normalize(torch.randn(9, 5, generator=generator, dtype=torch.float64), dim=1) for _ in range(3)]


def terms_of(*embeddings, **options):
    return gap_loss(*embeddings, backend="reference", return_terms=True, **options)


def test_info_nce_is_the_mean_negative_log_probability_of_the_positive(unit):
    x, y, _ = unit
    total = 0.0
    for i in range(9):
        row = sum(math.exp(12.0 * (x[i] @ y[j]).item()) for j in range(9))
        col = sum(math.exp(12.0 * (x[j] @ y[i]).item()) for j in range(9))
        positive = math.exp(12.0 * (x[i] @ y[i]).item())
        total -= (math.log(positive / row) + math.log(positive / col)) / 2 / 9
    assert terms_of(x, y, logit_scale=12.0).info_nce.item() == pytest.approx(total, rel=1e-12)


def test_pairs_anchor_and_all_average_over_their_pairs(unit):
    x, y, z = unit
    of = {
        pair: terms_of(unit[pair[0]], unit[pair[1]], logit_scale=5.0).info_nce.item()
        for pair in ((0, 1), (0, 2), (1, 2))
    }
    by_anchor = [(of[0, 1] + of[0, 2]) / 2, (of[0, 1] + of[1, 2]) / 2, (of[0, 2] + of[1, 2]) / 2]
    for anchor, expected in enumerate(by_anchor):
        actual = terms_of(x, y, z, logit_scale=5.0, anchor=anchor).info_nce.item()
        assert actual == pytest.approx(expected, rel=1e-12)
    every = terms_of(x, y, z, logit_scale=5.0, pairs="all").info_nce.item()
    assert every == pytest.approx(sum(of.values()) / 3, rel=1e-12)


def test_alignment_is_the_mean_squared_distance_to_the_anchor(unit):
    x, y, z = unit
    expected = (((y - x) ** 2).sum() + ((z - x) ** 2).sum()) / (2 * 9)
    assert terms_of(x, y, z).align_true_pairs.item() == pytest.approx(expected.item(), rel=1e-12)
    expected = (((x - z) ** 2).sum() + ((y - z) ** 2).sum()) / (2 * 9)
    assert terms_of(x, y, z, anchor=2, pairs="all").align_true_pairs.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("normalize_centroids", [True, False])
def test_uniformity_is_the_log_mean_potential_of_pairwise_distances(unit, normalize_centroids):
    centroid = sum(unit) / 3
    if normalize_centroids:
        centroid = F.normalize(centroid, dim=1)
    expected = torch.pdist(centroid).square().mul(-3.0).exp().mean().log()
    actual = terms_of(*unit, uniformity_t=3.0, normalize_centroids=normalize_centroids).centroid_uniformity
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_papers_sum_over_j_differs_by_log_n_minus_one(unit):
    x, y, _ = unit
    centroid = (x + y) / 2
    potential = torch.cdist(centroid, centroid).square().mul(-2.0).exp().fill_diagonal_(0)
    paper = (potential.sum() / 9).log().item()
    actual = terms_of(x, y, normalize_centroids=False).centroid_uniformity.item()
    assert actual + math.log(8) == pytest.approx(paper, rel=1e-12)


def test_loss_is_the_weighted_sum_and_zero_weights_drop_their_term(unit):
    x, y, _ = unit
    full = terms_of(x, y)
    weighted = terms_of(x, y, nce_weight=0.5, atp_weight=2.0, cu_weight=0.25)
    expected = 0.5 * full.info_nce + 2.0 * full.align_true_pairs + 0.25 * full.centroid_uniformity
    assert weighted.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    nothing = terms_of(x, y, nce_weight=0.0, atp_weight=0.0, cu_weight=0.0)
    assert nothing.loss.item() == 0
    assert nothing[1:4] == (None, None, None)


def test_diagnostics(unit):
    x, y, z = unit
    terms = terms_of(x, 3 * y, z, normalize=False)  # the diagnostics normalise whatever the loss does
    gaps = [(a.mean(0) - b.mean(0)).norm().item() for a, b in ((x, y), (x, z), (y, z))]
    cosines = [(a * b).sum(1).mean().item() for a, b in ((x, y), (x, z), (y, z))]
    assert terms.modality_gap.item() == pytest.approx(sum(gaps) / 3, rel=1e-12)
    assert terms.true_pair_cosine.item() == pytest.approx(sum(cosines) / 3, rel=1e-12)


def test_second_derivatives_exist(unit):
    x = unit[0].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: gap_loss(v, unit[1], backend="reference"), (x,))
