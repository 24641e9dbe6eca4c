"""Whether classes form groups: k-means, nearest neighbours and a linear probe, through scikit-learn."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from gapkernels.metrics._inputs import (
    Labels,
    check_alike,
    check_rows,
    joint_codes,
    label_array,
    positive_int,
    unit_rows,
)

Embeddings: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


class ClusteringResult(NamedTuple):
    """Agreement of clusters with labels, and whether clusters hold samples whole.

    Attributes:
        v_measure: in [0, 1].
        nmi: normalised mutual information (arithmetic mean), which equals the V-measure by definition.
        ari: adjusted Rand index, at most 1, 0 for chance.
        undivided: share of samples whose rows, one per modality, all lie in one cluster. Where a modality gap splits
            the clusters it is small, whatever their V-measure.
    """

    v_measure: float
    nmi: float
    ari: float
    undivided: float


@torch.no_grad()
def clustering(
    embeddings: Embeddings, labels: Labels, n_clusters: int | None = None, seed: int = 0, *, n_init: int = 10
) -> ClusteringResult:
    """Agreement of k-means clusters with the labels, all modalities clustered together.

    Args:
        embeddings: [N, D], any float dtype, or a sequence of such tensors, one per modality: these are stacked to
            M·N rows, each with the label of its sample. Rows are normalised first.
        labels: N integers or strings (tensor, array or sequence).
        n_clusters: number of clusters; the number of classes by default.
        seed: seed of the k-means++ starts.
        n_init: number of starts, of which the tightest clustering is kept. 10 rather than scikit-learn's 1, because one
            start moves the V-measure by more than most methods differ.

    Returns:
        `ClusteringResult`: V-measure, NMI (both in [0, 1]), adjusted Rand index (at most 1, 0 for chance) and the
        share of undivided samples (in [0, 1]; 1 for a single modality).

    Raises:
        TypeError: an embedding is not a floating point tensor, labels are neither integers nor strings.
        ValueError: shapes, devices or number of labels that do not fit, more clusters than rows, NaN or infinity.
        RuntimeError: scikit-learn is missing.

    Source:
        Grassucci et al., "Closing the Modality Gap Aligns Group-Wise Semantics", ICLR 2026; V-measure: Rosenberg and
        Hirschberg, EMNLP-CoNLL 2007.

    Examples:
        >>> image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.1], [0.1, 1.0]])
        >>> clustering([image, text], ["dog", "cat"])
        ClusteringResult(v_measure=1.0, nmi=1.0, ari=1.0, undivided=1.0)
    """
    sklearn = import_sklearn("clustering")
    modalities = _modalities("embeddings", embeddings)
    rows = modalities.shape[0] * modalities.shape[1]
    (codes,) = joint_codes(labels=label_array("labels", labels, modalities.shape[1]))
    clusters = int(codes.max()) + 1 if n_clusters is None else positive_int("n_clusters", n_clusters)
    if clusters > rows:
        raise ValueError(f"`n_clusters` must be at most the number of rows, {rows}, got {clusters}")
    kmeans = sklearn.KMeans(clusters, n_init=positive_int("n_init", n_init), random_state=seed)
    found = kmeans.fit_predict(modalities.reshape(rows, -1))
    by_modality = found.reshape(modalities.shape[:2])
    truth = np.tile(codes, modalities.shape[0])
    return ClusteringResult(
        float(sklearn.v_measure_score(truth, found)),
        float(sklearn.normalized_mutual_info_score(truth, found)),
        float(sklearn.adjusted_rand_score(truth, found)),
        float((by_modality == by_modality[0]).all(axis=0).mean()),
    )


@torch.no_grad()
def knn_accuracy(
    embeddings: Embeddings,
    labels: Labels,
    *,
    k: int = 5,
    test_fraction: float = 0.2,
    seed: int = 0,
    splits: int = 1,
    groups: Labels | None = None,
    test: tuple[Embeddings, Labels] | None = None,
) -> float:
    """Accuracy of a k-nearest-neighbour vote on a stratified split (or on a test set that is given).

    Neighbours are nearest in cosine. Several modalities are stacked after the split, so all rows of one sample fall
    on the same side: a test image never finds its own caption among the neighbours.

    Args:
        embeddings: [N, D], any float dtype, or a sequence of such tensors, one per modality.
        labels: N integers or strings (tensor, array or sequence).
        k: number of neighbours.
        test_fraction: share of the samples to test on, in (0, 1); every class contributes in proportion.
        seed: seed of the split.
        splits: number of splits, seeds `seed`, `seed` + 1 and so on, over which the accuracy is averaged. One, as in
            the paper, moves it by more than most methods differ where a split leaves few groups to test on.
        groups: N integers or strings; samples of one group stay on one side of the split. For an image that is
            repeated once per caption, pass the image's id. All samples of a group must have one label.
        test: embeddings and labels to test on, formed like `embeddings` and `labels`; then there is no split.

    Returns:
        The accuracy over all test rows, in [0, 1].

    Raises:
        TypeError: an embedding is not a floating point tensor, labels are neither integers nor strings.
        ValueError: shapes, devices or number of labels that do not fit, `k` above the number of training rows, a split
            without training or test samples, a group with two labels, NaN or infinity.
        RuntimeError: scikit-learn is missing.

    Source:
        Grassucci et al., "Closing the Modality Gap Aligns Group-Wise Semantics", ICLR 2026 (k = 5, 80/20). The authors'
        code draws single rows of the stack, so that a test image can meet its own caption; this one does not.

    Examples:
        >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(10, 1)
        >>> knn_accuracy(image, ["dog", "cat"] * 10)
        1.0
    """
    sklearn = import_sklearn("knn_accuracy")
    neighbours = positive_int("k", k)
    accuracies = []
    for data in _train_and_test(embeddings, labels, test_fraction, seed, splits, groups, test):
        rows = len(data.train_codes)
        if neighbours > rows:
            raise ValueError(f"`k` must be at most the number of training rows, {rows}, got {neighbours}")
        # On unit rows the Euclidean order is the order of cosines.
        classifier = sklearn.KNeighborsClassifier(neighbours).fit(data.train, data.train_codes)
        accuracies.append(classifier.score(data.test, data.test_codes))
    return fmean(accuracies)


@torch.no_grad()
def linear_probe(
    embeddings: Embeddings,
    labels: Labels,
    *,
    C: float = 1.0,
    max_iter: int = 1000,
    test_fraction: float = 0.2,
    seed: int = 0,
    splits: int = 1,
    groups: Labels | None = None,
    test: tuple[Embeddings, Labels] | None = None,
) -> float:
    """Accuracy of a logistic regression on the split of `knn_accuracy` (or on a test set that is given).

    Args:
        embeddings: [N, D], any float dtype, or a sequence of such tensors, one per modality; rows are normalised.
        labels: N integers or strings (tensor, array or sequence), at least two classes.
        C: inverse weight of the squared penalty, > 0, as in scikit-learn.
        max_iter: limit of L-BFGS iterations.
        test_fraction: share of the samples to test on, in (0, 1); every class contributes in proportion.
        seed: seed of the split; one seed gives `knn_accuracy` and this function the same split.
        splits: number of splits to average over, as for `knn_accuracy`.
        groups: N integers or strings; samples of one group stay on one side of the split.
        test: embeddings and labels to test on, formed like `embeddings` and `labels`; then there is no split.

    Returns:
        The accuracy over all test rows, in [0, 1].

    Raises:
        TypeError: an embedding is not a floating point tensor, labels are neither integers nor strings.
        ValueError: shapes, devices or number of labels that do not fit, fewer than two classes, a split without
            training or test samples, a group with two labels, NaN or infinity.
        RuntimeError: scikit-learn is missing.

    Source:
        Grassucci et al., "Closing the Modality Gap Aligns Group-Wise Semantics", ICLR 2026. The authors' code trains
        the linear layer with Adam and reports the best test epoch; this is the converged optimum, which has no epoch
        to choose.

    Examples:
        >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(10, 1)
        >>> linear_probe(image, ["dog", "cat"] * 10)
        1.0
    """
    sklearn = import_sklearn("linear_probe")
    if not C > 0:
        raise ValueError(f"`C` must be > 0, got {C}")
    accuracies = []
    for data in _train_and_test(embeddings, labels, test_fraction, seed, splits, groups, test):
        if len(np.unique(data.train_codes)) < 2:
            raise ValueError("`labels` must hold at least 2 classes, got 1 in the training set")
        classifier = sklearn.LogisticRegression(C=C, max_iter=positive_int("max_iter", max_iter))
        accuracies.append(classifier.fit(data.train, data.train_codes).score(data.test, data.test_codes))
    return fmean(accuracies)


class _Split(NamedTuple):
    """Unit rows and class numbers to train and to test on, modalities stacked."""

    train: np.ndarray
    train_codes: np.ndarray
    test: np.ndarray
    test_codes: np.ndarray


def _train_and_test(
    embeddings: Embeddings,
    labels: Labels,
    test_fraction: float,
    seed: int,
    splits: int,
    groups: Labels | None,
    test: tuple[Embeddings, Labels] | None,
) -> Iterator[_Split]:
    count_of_splits = positive_int("splits", splits)
    modalities = _modalities("embeddings", embeddings)
    count, samples, width = modalities.shape
    array = label_array("labels", labels, samples)
    if test is not None:
        if groups is not None:
            raise ValueError("`groups` only guides the split, got it together with `test`")
        if count_of_splits > 1:
            raise ValueError(f"`splits` must be 1 where `test` is given, got {splits}")
        held_out = _modalities("test[0]", test[0])
        if held_out.shape[2] != width:
            raise ValueError(f"`test[0]` must have as many columns as `embeddings`, {width}, got {held_out.shape[2]}")
        held_out_array = label_array("test[1]", test[1], held_out.shape[1])
        codes, held_out_codes = joint_codes(**{"labels": array, "test[1]": held_out_array})
        yield _Split(
            modalities.reshape(-1, width),
            np.tile(codes, count),
            held_out.reshape(-1, width),
            np.tile(held_out_codes, held_out.shape[0]),
        )
        return

    (codes,) = joint_codes(labels=array)
    group_codes = np.arange(samples)
    if groups is not None:
        (group_codes,) = joint_codes(groups=label_array("groups", groups, samples))
    for number in range(count_of_splits):
        chosen = _stratified_test_samples(codes, group_codes, test_fraction, seed + number)
        yield _Split(
            modalities[:, ~chosen].reshape(-1, width),
            np.tile(codes[~chosen], count),
            modalities[:, chosen].reshape(-1, width),
            np.tile(codes[chosen], count),
        )


def _stratified_test_samples(codes: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Mark the test samples: whole groups, of each class within one group of its share, never a whole class.

    scikit-learn's stratified splitters refuse classes with a single member, which real label sets have.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`test_fraction` must be between 0 and 1, both excluded, got {fraction}")
    first = np.unique(groups, return_index=True)[1]
    group_class = codes[first]
    mixed = np.flatnonzero(group_class[groups] != codes)
    if mixed.size:
        raise ValueError(f"`groups` must hold samples of one label each, got two labels in the group of row {mixed[0]}")

    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(group_class[order], kind="stable")]
    # Along the classes, every 1/fraction-th group is tested; the shuffle decides which group of a class that is.
    steps = np.floor(np.arange(len(order) + 1) * fraction + 0.5)
    in_test = np.zeros(len(order), dtype=bool)
    in_test[order] = np.diff(steps) > 0
    for label in np.setdiff1d(group_class, group_class[~in_test]):
        in_test[np.flatnonzero(group_class == label)[0]] = False
    if not in_test.any():
        raise ValueError(
            f"`test_fraction` must leave samples on both sides, got {fraction} of {len(first)} samples (or groups) in "
            f"{len(np.unique(codes))} classes, each of which needs one to train on"
        )
    return in_test[groups]


def _modalities(name: str, embeddings: Embeddings) -> np.ndarray:
    """Check one embedding or several and return their unit rows as float32 [M, N, D]."""
    if isinstance(embeddings, torch.Tensor):
        check_rows(**{name: embeddings})
        return unit_rows(name, embeddings).float().cpu().numpy()[None]
    if not isinstance(embeddings, Sequence) or not embeddings:
        given = "an empty one" if isinstance(embeddings, Sequence) else type(embeddings).__name__
        raise TypeError(f"`{name}` must be a tensor [N, D] or a sequence of such tensors, got {given}")
    names = [f"{name}[{index}]" for index in range(len(embeddings))]
    check_alike(names, embeddings)
    return np.stack([unit_rows(n, e).float().cpu().numpy() for n, e in zip(names, embeddings, strict=True)])


def import_sklearn(caller: str) -> SimpleNamespace:
    """Import the parts of scikit-learn in use here, or say how to install it."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, v_measure_score
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise RuntimeError(f'{caller} needs scikit-learn: pip install "gapkernels[metrics]"') from error
    return SimpleNamespace(
        KMeans=KMeans,
        KNeighborsClassifier=KNeighborsClassifier,
        LogisticRegression=LogisticRegression,
        adjusted_rand_score=adjusted_rand_score,
        normalized_mutual_info_score=normalized_mutual_info_score,
        v_measure_score=v_measure_score,
    )
