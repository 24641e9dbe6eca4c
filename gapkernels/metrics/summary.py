"""All metrics of one set of embeddings in one call."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from gapkernels.metrics._inputs import Labels, check_alike, check_finite, label_array, positive_int
from gapkernels.metrics.geometry import modality_gap, true_pair_cosine, uniformity, within_modality_cosine
from gapkernels.metrics.grouping import clustering, import_sklearn, knn_accuracy, linear_probe
from gapkernels.metrics.ranking import retrieval


def evaluate(
    embeddings: Mapping[str, torch.Tensor],
    *,
    labels: Labels | None = None,
    ids: Labels | None = None,
    groups: Labels | None = None,
    anchor: str | None = None,
    ks: Sequence[int] = (1, 5, 10),
    k: int = 5,
    splits: int = 1,
    max_samples: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Every metric of a set of embeddings under flat names.

    Clustering, kNN and linear probe run, as in the paper's code, on all modalities stacked (`v_measure`, `nmi`,
    `ari`, `undivided`, `knn`, `linear_probe`); a sample's modalities stay on one side of the split. Where all samples
    of a class share one text, the text rows of the stack are grouped and classified without effort, so V-measure, kNN
    and linear probe are given for each modality alone as well (`v_measure/image`, `knn/image`, `linear_probe/image`).

    Args:
        embeddings: two or more modalities by name, each [N, D], any float dtype, of one shape and on one device; row i
            of each belongs to sample i.
        labels: N classes, integers or strings; without them the clustering and classification metrics are left out.
        ids: N integers or strings for retrieval, see `retrieval`; by default each sample matches itself alone.
        groups: N integers or strings; samples of one group stay on one side of the split, see `knn_accuracy`.
        anchor: the modality that the others are retrieved from and by; the first by default.
        ks: depths of retrieval.
        k: number of neighbours for `knn`.
        splits: number of splits that kNN and linear probe are averaged over, see `knn_accuracy`.
        max_samples: limit on the samples for clustering, kNN and linear probe, drawn at random; none by default.
        seed: seed of that draw, of k-means and of the split.

    Returns:
        `gap`, `true_pair_cosine`, for each modality `within_cosine/image` and `uniformity/image`, for each modality
        beside the anchor, both ways, `image_to_text/R@1`, `image_to_text/median_rank` and `image_to_text/mean_rank`,
        and with labels the keys above. Rates are fractions in [0, 1]; ranks count from 1.

    Raises:
        TypeError: an embedding is not a floating point tensor, labels are neither integers nor strings.
        ValueError: fewer than two modalities or samples, an unknown anchor, sizes that do not fit, NaN or infinity.
        RuntimeError: labels are given and scikit-learn is missing.

    Source:
        Grassucci et al., "Closing the Modality Gap Aligns Group-Wise Semantics", ICLR 2026.

    Examples:
        >>> image, text = torch.eye(4), torch.eye(4).roll(1, dims=1)
        >>> result = evaluate({"image": image, "text": text}, ks=(1,))
        >>> result["gap"], result["true_pair_cosine"], result["image_to_text/R@1"]
        (0.0, 0.0, 0.0)
    """
    if not isinstance(embeddings, Mapping):
        raise TypeError(f"`embeddings` must map names to tensors [N, D], got {type(embeddings).__name__}")
    names, values = list(embeddings), list(embeddings.values())
    if len(names) < 2:
        raise ValueError(f"`embeddings` must hold at least 2 modalities, got {names}")
    titles = [f"embeddings[{name!r}]" for name in names]
    check_alike(titles, values)
    for title, value in zip(titles, values, strict=True):
        check_finite(title, value)
    samples = values[0].shape[0]
    if samples < 2:
        raise ValueError(f"`embeddings` must hold at least 2 samples, got {samples}")
    anchor = names[0] if anchor is None else anchor
    if anchor not in names:
        raise ValueError(f"`anchor` must be one of {names}, got {anchor!r}")
    if labels is not None:  # before the long computations
        import_sklearn("evaluate with `labels`")
        label_values = label_array("labels", labels, samples)
        group_values = np.arange(samples) if groups is None else label_array("groups", groups, samples)
        limit = samples if max_samples is None else positive_int("max_samples", max_samples)

    result = {"gap": modality_gap(*values), "true_pair_cosine": true_pair_cosine(*values)}
    for name, value in embeddings.items():
        result[f"within_cosine/{name}"] = within_modality_cosine(value)
        result[f"uniformity/{name}"] = uniformity(value)

    for name, value in embeddings.items():
        if name == anchor:
            continue
        both = retrieval(value, embeddings[anchor], ids=ids, ks=ks)
        ways = {f"{name}_to_{anchor}": both.query_to_target, f"{anchor}_to_{name}": both.target_to_query}
        for way, direction in ways.items():
            result |= {f"{way}/R@{k}": recall for k, recall in direction.recall.items()}
            result[f"{way}/median_rank"] = direction.median_rank
            result[f"{way}/mean_rank"] = direction.mean_rank

    if labels is not None:
        if limit < samples:
            kept = np.sort(np.random.default_rng(seed).permutation(samples)[:limit])
            embeddings = {name: value[torch.from_numpy(kept)] for name, value in embeddings.items()}
            label_values, group_values = label_values[kept], group_values[kept]
        stacked = list(embeddings.values())
        result |= clustering(stacked, label_values, seed=seed)._asdict()
        knn = partial(knn_accuracy, labels=label_values, k=k, seed=seed, splits=splits, groups=group_values)
        probe = partial(linear_probe, labels=label_values, seed=seed, splits=splits, groups=group_values)
        result["knn"] = knn(stacked)
        result["linear_probe"] = probe(stacked)
        for name, value in embeddings.items():
            result[f"v_measure/{name}"] = clustering(value, label_values, seed=seed).v_measure
            result[f"knn/{name}"] = knn(value)
            result[f"linear_probe/{name}"] = probe(value)
    return result
