"""Clustering, kNN and linear probe against direct definitions, and the split that they share."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gapkernels.metrics import clustering, knn_accuracy, linear_probe
from gapkernels.metrics.grouping import _stratified_test_samples

pytest.importorskip("sklearn")


def blobs(
    n: int, classes: int, noise: float, seed: int = 0, d: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples around one random direction per class; the directions do not depend on the seed."""
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return (centres[labels] + noise * torch.randn(n, d, generator=generator)).to(dtype), labels


def direct_v_measure(truth: list[int], found: list[int]) -> float:
    def entropy(counts: Counter) -> float:
        return -sum(c / len(truth) * math.log(c / len(truth)) for c in counts.values())

    h_truth, h_found = entropy(Counter(truth)), entropy(Counter(found))
    h_joint = entropy(Counter(zip(truth, found, strict=True)))
    homogeneity = 1 - (h_joint - h_found) / h_truth
    completeness = 1 - (h_joint - h_truth) / h_found
    return 2 * homogeneity * completeness / (homogeneity + completeness)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_clustering_of_separate_classes_is_perfect(dtype: torch.dtype) -> None:
    x, labels = blobs(120, 4, 0.05, dtype=dtype)
    perfect = pytest.approx((1.0, 1.0, 1.0, 1.0))
    assert clustering(x, labels) == perfect
    assert clustering([x, 3 * x], labels) == perfect  # normalised: the factor is no modality gap


def test_clustering_agrees_with_the_definition_of_the_v_measure() -> None:
    """One-dimensional unit rows are ±1, so two clusters are known without k-means."""
    x = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, 2, 5, -3])[:, None]
    labels = [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    result = clustering(x, labels)
    assert result.v_measure == pytest.approx(direct_v_measure(labels, (x[:, 0] > 0).int().tolist()))
    assert 0.05 < result.v_measure < 0.95
    assert result.nmi == pytest.approx(result.v_measure)


def test_a_modality_gap_ruins_the_clustering_of_the_stack() -> None:
    x, labels = blobs(120, 2, 0.05)
    shift = torch.zeros(8)
    shift[0] = 50
    apart = clustering([x - shift, x + shift], labels)  # two clusters: the modalities
    assert apart.v_measure < 0.05
    assert apart.ari < 0.05
    assert apart.undivided == 0.0


def test_samples_with_all_modalities_in_one_cluster_are_undivided() -> None:
    """One-dimensional unit rows are ±1: a sample is undivided if its modalities agree in sign."""
    first = torch.tensor([1.0, 1, 1, -1, -1, -1, 1, -1])[:, None]
    second = torch.tensor([2.0, 3, -1, -1, -5, 1, 1, -1])[:, None]
    third = torch.tensor([1.0, -1, -1, -1, -1, -1, 1, 1])[:, None]
    labels = [0, 0, 0, 1, 1, 1, 0, 1]
    assert clustering([first, second], labels).undivided == 6 / 8
    assert clustering([first, second, third], labels).undivided == 4 / 8
    assert clustering(first, labels).undivided == 1.0


def test_number_of_clusters_and_seed() -> None:
    x, labels = blobs(200, 4, 1.5)
    default = clustering(x, labels)
    assert default == clustering(x, labels, n_clusters=4, seed=0)
    assert default != clustering(x, labels, n_clusters=9)
    assert default == clustering(x, [f"class {label}" for label in labels.tolist()])
    results = {clustering(x, labels, seed=seed, n_init=1) for seed in range(5)}
    assert len(results) > 1


def direct_knn(train: torch.Tensor, train_y: torch.Tensor, test: torch.Tensor, test_y: torch.Tensor, k: int) -> float:
    score = F.normalize(test.double(), dim=1) @ F.normalize(train.double(), dim=1).T
    nearest = train_y[score.topk(k, dim=1).indices]
    votes = F.one_hot(nearest, int(train_y.max()) + 1).sum(dim=1)
    return (votes.argmax(dim=1) == test_y).double().mean().item()


@pytest.mark.parametrize("k", [1, 5, 40])
def test_knn_on_a_given_test_set(k: int) -> None:
    x, labels = blobs(200, 5, 2.0)
    test_x, test_labels = blobs(150, 5, 2.0, seed=1)
    expected = direct_knn(x, labels, test_x, test_labels, k)
    assert 0.3 < expected < 0.95
    assert knn_accuracy(x, labels, k=k, test=(test_x, test_labels)) == pytest.approx(expected)


def test_knn_on_the_split() -> None:
    x, labels = blobs(200, 5, 2.0)
    chosen = torch.from_numpy(_stratified_test_samples(labels.numpy(), np.arange(200), 0.2, 7))
    expected = direct_knn(x[~chosen], labels[~chosen], x[chosen], labels[chosen], 5)
    assert knn_accuracy(x, labels, seed=7) == pytest.approx(expected)
    assert len({knn_accuracy(x, labels, seed=seed) for seed in range(5)}) > 1


def test_knn_on_the_split_of_a_stack() -> None:
    x, labels = blobs(200, 5, 2.0)
    y, _ = blobs(200, 5, 2.5, seed=3)
    chosen = torch.from_numpy(_stratified_test_samples(labels.numpy(), np.arange(200), 0.2, 0))
    expected = direct_knn(
        torch.cat([x[~chosen], y[~chosen]]),
        labels[~chosen].repeat(2),
        torch.cat([x[chosen], y[chosen]]),
        labels[chosen].repeat(2),
        5,
    )
    assert knn_accuracy([x, y], labels) == pytest.approx(expected)


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_probe])
def test_several_splits_are_averaged(accuracy) -> None:
    x, labels = blobs(200, 5, 2.0)
    one_by_one = [accuracy(x, labels, seed=seed) for seed in (3, 4, 5)]
    assert len(set(one_by_one)) > 1
    assert accuracy(x, labels, seed=3, splits=3) == pytest.approx(sum(one_by_one) / 3)


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_probe])
def test_the_modalities_of_a_sample_stay_on_one_side(accuracy) -> None:
    """Rows say nothing of random labels, but each sample's copy in the other modality would give its label away."""
    x = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(2, (400,), generator=torch.Generator().manual_seed(1))
    options = {"k": 1} if accuracy is knn_accuracy else {"C": 1e4}
    assert accuracy([x, x], labels, **options) < 0.7
    # The same rows as one tensor, without and with the groups that tie the copies together.
    twice, twice_labels, groups = x.repeat(2, 1), labels.repeat(2), torch.arange(400).repeat(2)
    assert accuracy(twice, twice_labels, **options) > 0.8
    assert accuracy(twice, twice_labels, groups=groups, **options) < 0.7


def test_linear_probe_sees_what_is_linear() -> None:
    x, labels = blobs(300, 3, 0.3)
    assert linear_probe(x, labels) > 0.97
    ring = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    quadrant = (ring[:, 0] * ring[:, 1] > 0).long()  # no line separates opposite quadrants, neighbours do
    assert linear_probe(ring, quadrant) < 0.75
    assert knn_accuracy(ring, quadrant) > 0.9


def test_linear_probe_on_a_given_test_set() -> None:
    """With a weak penalty the boundary between two mirror images is their mirror, which classifies by sign."""
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    x[:, 0] = x[:, 0].abs() + 0.5
    train, train_labels = torch.cat([x, -x]), [1] * 200 + [0] * 200
    test = torch.tensor([[1.0, 0.3], [-1.0, 0.2], [2.0, -1.0], [-3.0, 1.0]])
    assert linear_probe(train, train_labels, test=(test, [1, 0, 1, 0])) == 1.0
    assert linear_probe(train, train_labels, test=(test, [1, 0, 0, 0])) == 0.75
    assert linear_probe([train, train], train_labels, test=([test, test], [1, 1, 0, 0])) == 0.5


def test_penalty_reaches_the_classifier() -> None:
    x, labels = blobs(300, 3, 0.3)
    labels[labels == 2] = 1  # so strong a penalty leaves only the larger class to answer with
    assert linear_probe(x, labels, C=1e-9) == pytest.approx((labels == 1).double().mean().item(), abs=0.02)
    assert linear_probe(x, labels, C=100.0) > 0.97


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_classifiers_take_every_dtype_and_layout(dtype: torch.dtype) -> None:
    x, labels = blobs(100, 3, 0.05, dtype=dtype)
    strided = x.T.contiguous().T.requires_grad_()
    assert knn_accuracy(strided, labels) == 1.0
    assert linear_probe(strided, labels) == 1.0


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("sizes", [(50, 50), (100, 10, 7), (1, 1, 1, 60), (3, 5), tuple(range(1, 30))])
def test_split_is_stratified(sizes: tuple[int, ...], fraction: float) -> None:
    codes = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(0).shuffle(codes)
    chosen = _stratified_test_samples(codes, np.arange(len(codes)), fraction, 0)
    for label, size in enumerate(sizes):
        tested = int(chosen[codes == label].sum())
        assert abs(tested - fraction * size) < 1 + 1e-9
        assert tested < size
    if min(sizes) >= 5:
        assert abs(chosen.sum() - fraction * len(codes)) <= 0.5 + 1e-9


def test_split_is_random_and_repeatable() -> None:
    codes, samples = np.zeros(1000, dtype=np.int64), np.arange(1000)
    splits = np.stack([_stratified_test_samples(codes, samples, 0.2, seed) for seed in range(200)])
    assert (splits == np.stack([_stratified_test_samples(codes, samples, 0.2, seed) for seed in range(200)])).all()
    # Each sample is tested in 40 of 200 splits on average, with a standard deviation of 5.7.
    assert splits.sum(axis=0).min() > 15
    assert splits.sum(axis=0).max() < 70


def test_split_keeps_groups_together() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(60, size=400)
    codes = groups % 3
    _, groups = np.unique(groups, return_inverse=True)
    chosen = _stratified_test_samples(codes, groups, 0.25, 0)
    assert set(groups[chosen]).isdisjoint(groups[~chosen])
    assert len(set(groups[chosen])) == round(0.25 * 60)


def test_collapsed_embeddings_give_chance() -> None:
    x = torch.ones(100, 4)
    labels = torch.arange(100) % 4
    with pytest.warns(Warning, match="distinct clusters"):
        assert clustering(x, labels).v_measure == 0.0
    assert knn_accuracy(x, labels) == 0.25
    assert linear_probe(x, labels) == 0.25


@pytest.mark.parametrize("measure", [clustering, knn_accuracy, linear_probe])
def test_errors(measure) -> None:
    x, labels = torch.ones(1000, 3), torch.zeros(1000, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`labels` must have 1000 entries, one per row, got shape \[999\]"):
        measure(x, labels[1:])
    with pytest.raises(TypeError, match=r"`labels` must hold integers or strings, got dtype torch.float32"):
        measure(x, labels.float())
    with pytest.raises(
        TypeError, match=r"`embeddings` must be a floating point tensor \[N, D\], got dtype torch.int64"
    ):
        measure(x.long(), labels)
    with pytest.raises(TypeError, match=r"`embeddings` must be a tensor .* or a sequence of such tensors, got dict"):
        measure({"image": x}, labels)
    with pytest.raises(TypeError, match=r"`embeddings` must be a tensor .* got an empty one"):
        measure([], labels)
    with pytest.raises(ValueError, match=r"`embeddings` must be \[N, D\] .* got shape \[1000\]"):
        measure(x[:, 0], labels)
    with pytest.raises(ValueError, match=r"`embeddings\[1\]` must have the shape of `embeddings\[0\]`"):
        measure([x, x[1:]], labels)
    with pytest.raises(
        ValueError, match=r"`embeddings\[1\]` must be on the device of `embeddings\[0\]`, cpu, got meta"
    ):
        measure([x, x.to("meta")], labels)
    with pytest.raises(ValueError, match=r"`embeddings\[1\]` must be finite, got NaN in row 0"):
        measure([x, x * math.nan], labels)


def test_errors_of_clustering() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"`n_clusters` must be at most the number of rows, 8, got 9"):
        clustering([x, x], [0, 1, 2, 3], n_clusters=9)
    with pytest.raises(ValueError, match=r"`n_clusters` must be an integer >= 1, got 0"):
        clustering(x, [0, 1, 2, 3], n_clusters=0)
    with pytest.raises(ValueError, match=r"`n_init` must be an integer >= 1, got -1"):
        clustering(x, [0, 1, 2, 3], n_init=-1)


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_probe])
def test_errors_of_the_split(accuracy) -> None:
    x, labels = torch.ones(20, 3), [0, 1] * 10
    for fraction in (0.0, 1.0, -1, math.nan):
        with pytest.raises(ValueError, match=r"`test_fraction` must be between 0 and 1, both excluded, got"):
            accuracy(x, labels, test_fraction=fraction)
    with pytest.raises(ValueError, match=r"`test_fraction` must leave samples on both sides, got 0.2 of 20 samples"):
        accuracy(x, range(20))
    with pytest.raises(ValueError, match=r"`groups` must have 20 entries, one per row, got shape \[2\]"):
        accuracy(x, labels, groups=[0, 1])
    with pytest.raises(ValueError, match=r"`groups` must hold samples of one label each, got two labels in .* row 1"):
        accuracy(x, labels, groups=[0] * 20)
    with pytest.raises(ValueError, match=r"`splits` must be an integer >= 1, got 0"):
        accuracy(x, labels, splits=0)
    with pytest.raises(ValueError, match=r"`splits` must be 1 where `test` is given, got 2"):
        accuracy(x, labels, splits=2, test=(x, labels))
    with pytest.raises(ValueError, match=r"`groups` only guides the split, got it together with `test`"):
        accuracy(x, labels, groups=range(20), test=(x, labels))
    with pytest.raises(ValueError, match=r"`test\[0\]` must have as many columns as `embeddings`, 3, got 2"):
        accuracy(x, labels, test=(x[:, :2], labels))
    with pytest.raises(ValueError, match=r"`test\[1\]` must have 20 entries, one per row, got shape \[19\]"):
        accuracy(x, labels, test=(x, labels[1:]))
    with pytest.raises(TypeError, match=r"`test\[1\]` must hold the same kind of values as `labels`, int64, got <U1"):
        accuracy(x, labels, test=(x, ["0", "1"] * 10))
    with pytest.raises(ValueError, match=r"`test\[0\]` must be finite, got NaN in row 0"):
        accuracy(x, labels, test=(x * math.nan, labels))


def test_errors_of_options() -> None:
    x, labels = torch.ones(20, 3), [0, 1] * 10
    with pytest.raises(ValueError, match=r"`k` must be at most the number of training rows, 16, got 17"):
        knn_accuracy(x, labels, k=17)
    with pytest.raises(ValueError, match=r"`k` must be an integer >= 1, got 0"):
        knn_accuracy(x, labels, k=0)
    for penalty in (0.0, math.nan):
        with pytest.raises(ValueError, match=r"`C` must be > 0, got"):
            linear_probe(x, labels, C=penalty)
    with pytest.raises(ValueError, match=r"`max_iter` must be an integer >= 1, got 0"):
        linear_probe(x, labels, max_iter=0)
    with pytest.raises(ValueError, match=r"`labels` must hold at least 2 classes, got 1 in the training set"):
        linear_probe(x, [0] * 20)


@pytest.mark.parametrize("measure", [clustering, knn_accuracy, linear_probe])
def test_missing_scikit_learn_is_named_with_its_remedy(measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    message = rf'{measure.__name__} needs scikit-learn: pip install "gapkernels\[metrics\]"'
    with pytest.raises(RuntimeError, match=message):
        measure(torch.ones(20, 3), [0, 1] * 10)
