"""All metrics of one set of embeddings in one call."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from gapkernels.metrics._inputs import (
    Labels,
    check_alike,
    check_device,
    check_finite,
    check_rows,
    joint_codes,
    label_array,
    positive_int,
    unit_rows,
)
from gapkernels.metrics.geometry import (
    matching_cosine,
    mean_gap,
    spread_gap,
    true_pair_cosine,
    uniformity,
    within_modality_cosine,
)
from gapkernels.metrics.grouping import clustering, import_sklearn, knn_accuracy, linear_probe
from gapkernels.metrics.ranking import check_matched, distinct_rows, retrieval


def evaluate(
    embeddings: Mapping[str, torch.Tensor],
    *,
    labels: Labels | None = None,
    ids: Labels | Mapping[str, Labels] | None = None,
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

    In retrieval, what occurs several times counts once, as a query and as a target: rows of one modality with the same
    id and the same embedding, such as an image that is repeated for each of its captions, or the name of a class. Where
    the modalities have different numbers of samples (the COCO protocol: 5,000 images, 25,000 captions), these may also
    be passed as they are, with `ids` by modality.

    Args:
        embeddings: two or more modalities by name, each [N, D], any float dtype, of one shape and on one device; row i
            of each belongs to sample i. With `ids` by modality N may differ, and rows belong together by their ids.
        labels: N classes, integers or strings; without them the clustering and classification metrics are left out.
        ids: N integers or strings for retrieval, see `retrieval`; by default each sample matches itself alone. Or such
            ids by modality, as many as it has rows, of which the anchor's must all occur in every other modality and
            the other way round; `true_pair_cosine` is then the mean over all pairs of rows with one id.
        groups: N integers or strings; samples of one group stay on one side of the split, see `knn_accuracy`.
        anchor: the modality that the others are retrieved from and by; the first by default.
        ks: depths of retrieval.
        k: number of neighbours for `knn`.
        splits: number of splits that kNN and linear probe are averaged over, see `knn_accuracy`.
        max_samples: limit on the samples for clustering, kNN and linear probe, drawn at random; none by default.
        seed: seed of that draw, of k-means and of the split.

    Returns:
        `gap` of the means, `distribution_gap`, `true_pair_cosine`, for each modality `within_cosine/image` and
        `uniformity/image`, for each modality beside the anchor, both ways, `image_to_text/R@1`,
        `image_to_text/median_rank` and `image_to_text/mean_rank`, and with labels the keys above. Rates are fractions
        in [0, 1]; ranks count from 1.

    Raises:
        TypeError: an embedding is not a floating point tensor, labels are neither integers nor strings.
        ValueError: fewer than two modalities or samples, an unknown anchor, sizes that do not fit, NaN or infinity,
            labels for modalities whose rows are not the same samples.
        RuntimeError: labels are given and scikit-learn is missing.

    Source:
        Grassucci et al., "Closing the Modality Gap Aligns Group-Wise Semantics", ICLR 2026.

    Examples:
        >>> image, text = torch.eye(4), torch.eye(4).roll(1, dims=1)
        >>> result = evaluate({"image": image, "text": text}, ks=(1,))
        >>> result["gap"], result["true_pair_cosine"], result["image_to_text/R@1"]
        (0.0, 0.0, 0.0)

        Two images, three captions:

        >>> caption = torch.tensor([[1.0, 0.1, 0.0, 0.0], [0.9, 0.2, 0.0, 0.0], [0.1, 1.0, 0.0, 0.0]])
        >>> ids = {"image": ["cat.jpg", "dog.jpg"], "text": ["cat.jpg", "cat.jpg", "dog.jpg"]}
        >>> evaluate({"image": image[:2], "text": caption}, ids=ids, ks=(1,))["text_to_image/R@1"]
        1.0
    """
    if not isinstance(embeddings, Mapping):
        raise TypeError(f"`embeddings` must map names to tensors [N, D], got {type(embeddings).__name__}")
    names, values = list(embeddings), list(embeddings.values())
    if len(names) < 2:
        raise ValueError(f"`embeddings` must hold at least 2 modalities, got {names}")
    titles = [f"embeddings[{name!r}]" for name in names]
    codes = _codes_by_modality(dict(zip(names, titles, strict=True)), embeddings, ids)
    for title, value in zip(titles, values, strict=True):
        check_finite(title, value)
        if value.shape[0] < 2:
            raise ValueError(f"`embeddings` must hold at least 2 samples, got {value.shape[0]}")
    samples = values[0].shape[0]
    anchor = names[0] if anchor is None else anchor
    if anchor not in names:
        raise ValueError(f"`anchor` must be one of {names}, got {anchor!r}")
    if isinstance(ids, Mapping):
        for name in names:
            for one, other in ((name, anchor), (anchor, name)):
                array = label_array(f"ids[{one!r}]", ids[one], len(codes[one]))
                check_matched(f"ids[{one!r}]", array, codes[one], f"ids[{other!r}]", codes[other])
    if labels is not None:  # before the long computations
        import_sklearn("evaluate with `labels`")
        if not all(np.array_equal(code, codes[anchor]) for code in codes.values()):
            raise ValueError(
                "`labels` must belong to samples that every modality has in the same order, got other `ids` for each: "
                "repeat rows, and pass `ids` and `groups` [N]"
            )
        label_values = label_array("labels", labels, samples)
        group_values = np.arange(samples) if groups is None else label_array("groups", groups, samples)
        limit = samples if max_samples is None else positive_int("max_samples", max_samples)

    units = [unit_rows(title, value) for title, value in zip(titles, values, strict=True)]
    result = {"gap": mean_gap(units), "distribution_gap": spread_gap(units)}
    if isinstance(ids, Mapping):
        result["true_pair_cosine"] = matching_cosine(units, list(codes.values()))
    else:
        result["true_pair_cosine"] = true_pair_cosine(*values)
    del units
    for name, value in embeddings.items():
        result[f"within_cosine/{name}"] = within_modality_cosine(value)
        result[f"uniformity/{name}"] = uniformity(value)

    distinct = {name: np.flatnonzero(distinct_rows(value, codes[name])) for name, value in embeddings.items()}
    once = {name: value[torch.from_numpy(distinct[name])] for name, value in embeddings.items()}
    ids_of = {name: codes[name][rows] for name, rows in distinct.items()}
    for name in names:
        if name == anchor:
            continue
        both = retrieval(once[name], once[anchor], query_ids=ids_of[name], target_ids=ids_of[anchor], ks=ks)
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


def _codes_by_modality(
    titles: Mapping[str, str],
    embeddings: Mapping[str, torch.Tensor],
    ids: Labels | Mapping[str, Labels] | None,
) -> dict[str, np.ndarray]:
    """Check shapes and ids; return a number for each row of each modality, equal where rows belong together."""
    if not isinstance(ids, Mapping):
        try:
            check_alike(list(titles.values()), list(embeddings.values()))
        except ValueError as error:
            counts = {len(value) for value in embeddings.values()}
            if len(counts) > 1:
                raise ValueError(f"{error} (for different numbers of samples pass `ids` by modality)") from None
            raise
        rows = next(iter(embeddings.values())).shape[0]
        codes = np.arange(rows) if ids is None else joint_codes(ids=label_array("ids", ids, rows))[0]
        return dict.fromkeys(titles, codes)
    if set(ids) != set(titles):
        raise ValueError(f"`ids` must be given for the modalities {list(titles)}, got them for {list(ids)}")
    (first_name, first), *others = embeddings.items()
    check_rows(**{titles[first_name]: first})
    for name, value in others:
        check_rows(**{titles[name]: value})
        if value.shape[1] != first.shape[1]:
            raise ValueError(
                f"`{titles[name]}` must have as many columns as `{titles[first_name]}`, {first.shape[1]}, got shape "
                f"{list(value.shape)}"
            )
        check_device(titles[name], value, titles[first_name], first)
    arrays = {
        f"ids[{name!r}]": label_array(f"ids[{name!r}]", ids[name], value.shape[0]) for name, value in embeddings.items()
    }
    return dict(zip(embeddings, joint_codes(**arrays), strict=True))
