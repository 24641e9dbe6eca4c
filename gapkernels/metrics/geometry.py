"""How the modalities lie on the sphere: gap, cosines and uniformity."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

from gapkernels.metrics._inputs import check_rows, several, tiles, unit_rows


@torch.no_grad()
def modality_gap(*embeddings: torch.Tensor) -> float:
    """Distance between the mean unit vectors of two modalities, averaged over all pairs of modalities.

    This is the gap of centroids alone: `distribution_gap` measures what it does not see.

    Args:
        *embeddings: two or more tensors [N, D], any float dtype, of one shape and on one device.

    Returns:
        ‖mean(x̂) − mean(ŷ)‖₂ in [0, 2]; 0 means that the modalities share their centre.

    Raises:
        TypeError: an embedding is not a floating point tensor.
        ValueError: fewer than two embeddings, unequal shapes or devices, an empty tensor, NaN or infinity.

    Source:
        Liang et al., "Mind the Gap", NeurIPS 2022.

    Examples:
        >>> image, text = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
        >>> round(modality_gap(image, text), 4)
        1.4142
    """
    names = several(embeddings)
    return mean_gap([unit_rows(name, value) for name, value in zip(names, embeddings, strict=True)])


def mean_gap(units: Sequence[torch.Tensor]) -> float:
    """Distance between the means of unit rows [N of the modality, D], averaged over all pairs of modalities."""
    means = [unit.mean(dim=0) for unit in units]
    return float(torch.stack([torch.linalg.vector_norm(x - y) for x, y in combinations(means, 2)]).mean())


@torch.no_grad()
def distribution_gap(*embeddings: torch.Tensor) -> float:
    """Distance between two modalities' distributions about their means, averaged over all pairs of modalities.

    The squared Fréchet distance of two sets of unit vectors is the squared gap of their means plus that of their
    covariances Σ (the squared 2-Wasserstein distance of the Gaussians with these moments, and a lower bound of that of
    the sets themselves). This is the root of the second part: what remains after a modality was shifted onto the other,
    which makes `modality_gap` zero and leaves clusters divided. Rows need not match.

    Args:
        *embeddings: two or more tensors [N, D], any float dtype, of one shape and on one device.

    Returns:
        √tr(Σ_x + Σ_y − 2(Σ_x^½ Σ_y Σ_x^½)^½) in [0, √2], near zero rounded to about 1e-8; 0 means that
        the modalities spread in the same directions as widely. Two random samples of one distribution are above zero,
        the more so the fewer rows there are for D columns: compare values of the same N.

    Raises:
        TypeError: an embedding is not a floating point tensor.
        ValueError: fewer than two embeddings, unequal shapes or devices, an empty tensor, NaN or infinity.

    Source:
        Liu et al., "The Geometry of Compromise", arXiv 2604.00279, for taking a centroid gap and a distribution gap
        apart and for what the latter predicts; the distance is that of Dowson and Landau, "The Fréchet distance between
        multivariate normal distributions", 1982, and its values are not those of that paper.

    Examples:
        >>> image, text = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
        >>> modality_gap(image, text), round(distribution_gap(image, text), 4)
        (0.0, 1.4142)
    """
    names = several(embeddings)
    return spread_gap([unit_rows(name, value) for name, value in zip(names, embeddings, strict=True)])


def spread_gap(units: Sequence[torch.Tensor]) -> float:
    """Fréchet distance of centred unit rows [N of the modality, D], averaged over all pairs of modalities."""
    # R of a QR decomposition has RᵀR = Σ. The trace of (Σ_x^½ Σ_y Σ_x^½)^½ is the sum of the singular values of
    # R_x R_yᵀ, without roots of eigenvalues that rounding has made negative.
    roots = [torch.linalg.qr((unit - unit.mean(dim=0)) / math.sqrt(unit.shape[0]), mode="r").R for unit in units]
    gaps = []
    for x, y in combinations(roots, 2):
        squared = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
        gaps.append(squared.clamp_min(0).sqrt())
    return float(torch.stack(gaps).mean())


@torch.no_grad()
def true_pair_cosine(*embeddings: torch.Tensor) -> float:
    """Mean cosine between matching rows of two modalities, averaged over all pairs of modalities.

    Args:
        *embeddings: two or more tensors [N, D], any float dtype, of one shape and on one device; row i of each
            belongs to sample i.

    Returns:
        The mean cosine, in [-1, 1].

    Raises:
        TypeError: an embedding is not a floating point tensor.
        ValueError: fewer than two embeddings, unequal shapes or devices, an empty tensor, NaN or infinity.

    Source:
        Grassucci et al., "Closing the Modality Gap Aligns Group-Wise Semantics", ICLR 2026.

    Examples:
        >>> image, text = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])
        >>> true_pair_cosine(image, text)
        0.5
    """
    names = several(embeddings)
    units = [unit_rows(name, value) for name, value in zip(names, embeddings, strict=True)]
    cosines = [(x * y).sum(dim=1).mean() for x, y in combinations(units, 2)]
    return float(torch.stack(cosines).mean())


def matching_cosine(units: Sequence[torch.Tensor], codes: Sequence[np.ndarray]) -> float:
    """Mean cosine over all pairs of rows of two modalities that carry the same code, averaged over pairs of modalities.

    Args:
        units: unit rows by modality, float64 [N of the modality, D].
        codes: a number from 0 on for each row, int64 [N of the modality]; every two modalities share some.
    """
    count = 1 + max(int(code.max()) for code in codes)
    sums = []
    for unit, code in zip(units, codes, strict=True):
        index = torch.from_numpy(code).to(unit.device)
        total = unit.new_zeros(count, unit.shape[1]).index_add_(0, index, unit)
        sums.append((total, index.bincount(minlength=count).to(unit.dtype)))
    # The cosines of all pairs of one code sum to the product of the code's sums.
    cosines = [(x * y).sum() / (n * m).sum() for (x, n), (y, m) in combinations(sums, 2)]
    return float(torch.stack(cosines).mean())


@torch.no_grad()
def within_modality_cosine(embedding: torch.Tensor) -> float:
    """Mean cosine between two different rows of one modality, in O(N·D) time.

    Args:
        embedding: [N, D], any float dtype, N >= 2.

    Returns:
        The mean of ⟨x̂_i, x̂_j⟩ over all i ≠ j; close to 1 when the modality sits in a narrow cone.

    Raises:
        TypeError: `embedding` is not a floating point tensor.
        ValueError: fewer than two rows, NaN or infinity.

    Source:
        Liang et al., "Mind the Gap", NeurIPS 2022 (the cone effect).

    Examples:
        >>> within_modality_cosine(torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])).__round__(4)
        -0.3333
    """
    _check_at_least_two_rows(embedding)
    unit = unit_rows("embedding", embedding)
    rows = unit.shape[0]
    # ‖Σx̂‖² holds every ordered pair, those with i = j included; a zero row has no unit norm, hence no "− N" here.
    all_pairs = unit.sum(dim=0).square().sum() - unit.square().sum()
    return float(all_pairs / (rows * (rows - 1)))


@torch.no_grad()
def uniformity(embedding: torch.Tensor, t: float = 2.0) -> float:
    """Logarithm of the mean Gaussian potential of all pairs of rows, in O(N·D) memory.

    Args:
        embedding: [N, D], any float dtype, N >= 2.
        t: sharpness of the potential, finite and > 0.

    Returns:
        log mean over i < j of exp(−t‖x̂_i − x̂_j‖²), in [−4t, 0]; lower means more uniform, 0 collapsed.

    Raises:
        TypeError: `embedding` is not a floating point tensor.
        ValueError: fewer than two rows, NaN or infinity, `t` not a positive number.

    Source:
        Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020.

    Examples:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        -8.0
    """
    _check_at_least_two_rows(embedding)
    if not (math.isfinite(t) and t > 0):
        raise ValueError(f"`t` must be a finite number > 0, got {t}")
    unit = unit_rows("embedding", embedding)
    rows = unit.shape[0]
    norm_sq = unit.square().sum(dim=1, keepdim=True)
    one = torch.ones_like(norm_sq)
    # Two more columns make each product the whole exponent: ⟨left_i, right_j⟩ = 2t⟨x̂_i, x̂_j⟩ − t‖x̂_i‖² − t‖x̂_j‖².
    left = torch.cat([2 * t * unit, -t * norm_sq, -t * one], dim=1)
    right = torch.cat([unit, one, norm_sq], dim=1)
    log_sum = unit.new_full((), -torch.inf)  # on the device until the end: no wait per tile
    for i in tiles(rows):
        for j in tiles(rows):
            if j.start < i.start:
                continue
            exponent = (left[i] @ right[j].T).clamp_(max=0)
            if i == j:
                exponent.masked_fill_(torch.ones_like(exponent, dtype=torch.bool).tril_(), -torch.inf)
            # In logarithms throughout: for large t every exp(−t·d²) may lie below the smallest float64.
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(exponent.flatten(), dim=0))
    return float(log_sum) - math.log(rows * (rows - 1) / 2)


def _check_at_least_two_rows(embedding: torch.Tensor) -> None:
    check_rows(embedding=embedding)
    if embedding.shape[0] < 2:
        raise ValueError(f"`embedding` must have at least 2 rows, got shape {list(embedding.shape)}")
