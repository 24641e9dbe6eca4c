"""`evaluate` as the sum of its parts, and the examples in the docstrings."""

import doctest
import importlib
import subprocess
import sys

import pytest
import torch

from gapkernels import metrics
from gapkernels.metrics import evaluate

N = 60
LABELS = [f"class {row % 3}" for row in range(N)]


def modalities(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator)
    meaning = centres[torch.arange(N) % 3] + torch.randn(N, 8, generator=generator)
    return {name: meaning + torch.randn(N, 8, generator=generator) for name in names}


def test_two_modalities() -> None:
    both = modalities("image", "text")
    image, text = both.values()
    result = evaluate(both, labels=LABELS, ks=(1, 7), seed=3)
    text_to_image, image_to_text = metrics.retrieval(text, image, ks=(1, 7))
    clusters = metrics.clustering([image, text], LABELS, seed=3)
    assert result == {
        "gap": metrics.modality_gap(image, text),
        "distribution_gap": metrics.distribution_gap(image, text),
        "true_pair_cosine": metrics.true_pair_cosine(image, text),
        "within_cosine/image": metrics.within_modality_cosine(image),
        "within_cosine/text": metrics.within_modality_cosine(text),
        "uniformity/image": metrics.uniformity(image),
        "uniformity/text": metrics.uniformity(text),
        "text_to_image/R@1": text_to_image.recall[1],
        "text_to_image/R@7": text_to_image.recall[7],
        "text_to_image/median_rank": text_to_image.median_rank,
        "text_to_image/mean_rank": text_to_image.mean_rank,
        "image_to_text/R@1": image_to_text.recall[1],
        "image_to_text/R@7": image_to_text.recall[7],
        "image_to_text/median_rank": image_to_text.median_rank,
        "image_to_text/mean_rank": image_to_text.mean_rank,
        "v_measure": clusters.v_measure,
        "nmi": clusters.nmi,
        "ari": clusters.ari,
        "undivided": clusters.undivided,
        "v_measure/image": metrics.clustering(image, LABELS, seed=3).v_measure,
        "v_measure/text": metrics.clustering(text, LABELS, seed=3).v_measure,
        "knn": metrics.knn_accuracy([image, text], LABELS, seed=3),
        "knn/image": metrics.knn_accuracy(image, LABELS, seed=3),
        "knn/text": metrics.knn_accuracy(text, LABELS, seed=3),
        "linear_probe": metrics.linear_probe([image, text], LABELS, seed=3),
        "linear_probe/image": metrics.linear_probe(image, LABELS, seed=3),
        "linear_probe/text": metrics.linear_probe(text, LABELS, seed=3),
    }
    assert text_to_image != image_to_text
    assert all(type(value) is float for value in result.values())


def test_without_labels_nothing_needs_scikit_learn() -> None:
    script = """
import sys
sys.modules["sklearn"] = None
import torch
from gapkernels.metrics import evaluate
assert evaluate({"a": torch.eye(3), "b": torch.eye(3)})["a_to_b/R@1"] == 1.0
try:
    evaluate({"a": torch.eye(3), "b": torch.eye(3)}, labels=[0, 1, 1])
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == 'evaluate with `labels` needs scikit-learn: pip install "gapkernels[metrics]"\n'


def test_three_modalities_around_their_anchor() -> None:
    all_three = modalities("text", "image", "audio")
    result = evaluate(all_three, anchor="image", ks=(1,))
    assert result["gap"] == metrics.modality_gap(*all_three.values())
    assert result["distribution_gap"] == metrics.distribution_gap(*all_three.values())
    assert result["true_pair_cosine"] == metrics.true_pair_cosine(*all_three.values())
    ways = {key.removesuffix("/R@1") for key in result if key.endswith("/R@1")}
    assert ways == {"text_to_image", "image_to_text", "audio_to_image", "image_to_audio"}
    audio_to_image, image_to_audio = metrics.retrieval(all_three["audio"], all_three["image"], ks=(1,))
    assert result["audio_to_image/R@1"] == audio_to_image.recall[1]
    assert result["image_to_audio/mean_rank"] == image_to_audio.mean_rank
    default = evaluate(all_three, ks=(1,))
    assert {key for key in default if key.endswith("/R@1")} == {
        f"{way}/R@1" for way in ("text_to_image", "image_to_text", "text_to_audio", "audio_to_text")
    }


def test_ids_reach_the_retrieval() -> None:
    both = modalities("image", "text")
    result = evaluate(both, ids=LABELS)
    expected = metrics.retrieval(both["image"], both["text"], ids=LABELS)
    assert result["image_to_text/R@1"] == expected.query_to_target.recall[1]
    assert result["image_to_text/R@1"] > evaluate(both)["image_to_text/R@1"]


def captioned(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, captions that tell a little of them, and whose each caption is: int64 [sum of counts]."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(len(counts), 24, generator=generator)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return image, image[owner] + 2.2 * torch.randn(len(owner), 24, generator=generator), owner


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
@pytest.mark.parametrize("counts", [[5] * 60, [3, 7, 1, 6, 5, 8] * 10])
def test_an_image_that_is_repeated_for_each_caption_counts_once(
    dtype: torch.dtype, noise: float, counts: list[int]
) -> None:
    """The protocol of COCO: a caption is looked for among the images, an image among all captions."""
    image, text, owner = (x.to(dtype) if x.is_floating_point() else x for x in captioned(counts))
    truth = metrics.retrieval(image, text, query_ids=torch.arange(60), target_ids=owner)
    repeated = image[owner] + (noise * torch.randn(300, 24)).to(dtype)
    result = evaluate({"image": repeated, "text": text}, ids=owner)
    by_modality = evaluate({"image": image, "text": text}, ids={"text": owner, "image": torch.arange(60)})
    for found in (result, by_modality):
        for way, direction in (("image_to_text", truth.query_to_target), ("text_to_image", truth.target_to_query)):
            assert [found[f"{way}/R@{k}"] for k in (1, 5, 10)] == pytest.approx(list(direction.recall.values()))
            assert found[f"{way}/mean_rank"] == pytest.approx(direction.mean_rank)
    # Similarities of the whole matrix, counted here.
    score = torch.nn.functional.normalize(text.double()) @ torch.nn.functional.normalize(image.double()).T
    rank = (score > score[torch.arange(300), owner][:, None]).sum(dim=1) + 1
    assert result["text_to_image/R@5"] == pytest.approx(float((rank <= 5).double().mean()))
    assert result["true_pair_cosine"] == pytest.approx(by_modality["true_pair_cosine"], abs=1e-6)
    if len(set(counts)) == 1:  # a mean over rows weighs each image by its captions
        assert result["gap"] == pytest.approx(by_modality["gap"], abs=1e-6)


def test_class_names_are_few_targets() -> None:
    image = torch.eye(10).repeat(6, 1) + 0.8 * torch.randn(60, 10, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(10).repeat(6)
    found = evaluate({"image": image, "text": torch.eye(10)[labels]}, ids=labels)
    rank = 1 + (image > image[torch.arange(60), labels][:, None]).sum(dim=1)
    assert 0.2 < float((rank == 1).double().mean()) < 0.9
    for k in (1, 5, 10):
        assert found[f"image_to_text/R@{k}"] == pytest.approx(float((rank <= k).double().mean()))


def test_numbers_of_samples_may_differ_with_ids_by_modality() -> None:
    image, text, owner = captioned([3, 7, 1, 4, 5, 2] * 8)
    audio = image[5:].flip(0)
    embeddings = {"image": image[5:], "text": text[owner >= 5], "audio": audio}
    names = [f"{number}.jpg" for number in range(48)]
    ids = {"image": names[5:], "text": [names[i] for i in owner.tolist() if i >= 5], "audio": names[5:][::-1]}
    found = evaluate(embeddings, ids=ids)
    truth = metrics.retrieval(*list(embeddings.values())[:2], query_ids=ids["image"], target_ids=ids["text"])
    assert found["text_to_image/R@5"] == truth.target_to_query.recall[5]
    assert found["image_to_text/median_rank"] == truth.query_to_target.median_rank
    assert found["image_to_audio/R@1"] == found["audio_to_image/R@1"] == 1.0
    units = {name: torch.nn.functional.normalize(rows.double()) for name, rows in embeddings.items()}
    pairs = [("image", "text"), ("image", "audio"), ("text", "audio")]
    cosines = [
        torch.stack(
            [
                x @ y
                for x, a in zip(units[m], ids[m], strict=True)
                for y, b in zip(units[n], ids[n], strict=True)
                if a == b
            ]
        ).mean()
        for m, n in pairs
    ]
    assert found["true_pair_cosine"] == pytest.approx(float(torch.stack(cosines).mean()))
    gaps = [(units[m].mean(dim=0) - units[n].mean(dim=0)).norm() for m, n in pairs]
    assert found["gap"] == pytest.approx(float(torch.stack(gaps).mean()))
    assert found["uniformity/text"] == metrics.uniformity(embeddings["text"])


def test_errors_of_ids_by_modality() -> None:
    image, text, owner = captioned([2] * 4)
    both, ids = {"image": image, "text": text}, {"image": range(4), "text": owner}
    with pytest.raises(
        ValueError, match=r"shape \[8, 24\] \(for different numbers of samples pass `ids` by modality\)"
    ):
        evaluate(both, ids=owner)
    with pytest.raises(
        ValueError, match=r"`ids` must be given for the modalities \['image', 'text'\], got them for \['image'\]"
    ):
        evaluate(both, ids={"image": range(4)})
    with pytest.raises(ValueError, match=r"`ids\['text'\]` must have 8 entries, one per row, got shape \[4\]"):
        evaluate(both, ids={**ids, "text": range(4)})
    with pytest.raises(
        ValueError, match=r"`ids\['text'\]` must hold ids that `ids\['image'\]` holds too, got 2 without"
    ):
        evaluate(both, ids={**ids, "text": owner + 1})
    with pytest.raises(ValueError, match="`labels` must belong to samples that every modality has in the same order"):
        evaluate(both, ids=ids, labels=[0, 1, 0, 1])
    with pytest.raises(
        ValueError, match=r"`embeddings\['text'\]` must have as many columns as `embeddings\['image'\]`, 24"
    ):
        evaluate({"image": image, "text": text[:, :3]}, ids=ids)


def test_groups_and_neighbours_reach_the_classifiers() -> None:
    both = modalities("image", "text")
    groups = [row % 30 for row in range(N)]  # rows r and r + 30 share their label, as 30 is a multiple of 3
    stacked = list(both.values())
    result = evaluate(both, labels=LABELS, groups=groups, k=2)
    assert result["knn"] == metrics.knn_accuracy(stacked, LABELS, k=2, groups=groups)
    assert result["linear_probe/text"] == metrics.linear_probe(both["text"], LABELS, groups=groups)
    with pytest.raises(ValueError, match=r"`groups` must hold samples of one label each"):
        evaluate(both, labels=LABELS, groups=[0] * N)


def test_limit_on_samples() -> None:
    both = modalities("image", "text")
    full = evaluate(both, labels=LABELS)
    assert evaluate(both, labels=LABELS, max_samples=N) == full
    assert evaluate(both, labels=LABELS, splits=2)["knn"] == metrics.knn_accuracy(list(both.values()), LABELS, splits=2)
    few = evaluate(both, labels=LABELS, max_samples=30, groups=range(N))
    assert few == evaluate(both, labels=LABELS, max_samples=30)
    assert few["v_measure"] != full["v_measure"]
    assert {key: few[key] for key in few if "/R@" in key} == {key: full[key] for key in full if "/R@" in key}

    # The labels and groups go with their rows: separate classes stay separate, a group has one label.
    apart = {name: torch.eye(3).repeat(N // 3, 1) + 0.01 * value[:, :3] for name, value in both.items()}
    clear = evaluate(apart, labels=LABELS, max_samples=30, groups=[row % 6 for row in range(N)])
    assert clear["v_measure"] == clear["knn"] == clear["linear_probe"] == 1.0


def test_errors() -> None:
    x = torch.eye(4)
    with pytest.raises(TypeError, match=r"`embeddings` must map names to tensors \[N, D\], got list"):
        evaluate([x, x])
    with pytest.raises(ValueError, match=r"`embeddings` must hold at least 2 modalities, got \['image'\]"):
        evaluate({"image": x})
    with pytest.raises(ValueError, match=r"`embeddings\['text'\]` must have the shape of `embeddings\['image'\]`"):
        evaluate({"image": x, "text": x[1:]})
    with pytest.raises(ValueError, match=r"`embeddings` must hold at least 2 samples, got 1"):
        evaluate({"image": x[:1], "text": x[:1]})
    with pytest.raises(ValueError, match=r"`embeddings\['text'\]` must be finite, got NaN in row 0"):
        evaluate({"image": x, "text": x * torch.nan})
    with pytest.raises(ValueError, match=r"`anchor` must be one of \['image', 'text'\], got 'audio'"):
        evaluate({"image": x, "text": x}, anchor="audio")
    with pytest.raises(ValueError, match=r"`labels` must have 4 entries, one per row, got shape \[3\]"):
        evaluate({"image": x, "text": x}, labels=[0, 1, 1])
    with pytest.raises(ValueError, match=r"`max_samples` must be an integer >= 1, got 0"):
        evaluate({"image": x, "text": x}, labels=[0, 1, 0, 1], max_samples=0)


@pytest.mark.parametrize("module", ["geometry", "ranking", "grouping", "summary"])
def test_examples_in_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"gapkernels.metrics.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_every_public_function_has_an_example() -> None:
    functions = [getattr(metrics, name) for name in metrics.__all__ if not isinstance(getattr(metrics, name), type)]
    assert len(functions) == 10
    assert [f.__name__ for f in functions if ">>>" not in (f.__doc__ or "")] == []
