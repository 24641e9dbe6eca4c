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
    assert len(functions) == 9
    assert [f.__name__ for f in functions if ">>>" not in (f.__doc__ or "")] == []
