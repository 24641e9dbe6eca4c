import json
from pathlib import Path

import numpy as np
import pytest
import torch

import gapkernels.training.evaluation
from gapkernels.errors import UserError
from gapkernels.training.evaluation import compute_precision, evaluate_file
from gapkernels.training.layout import CHECKPOINT, EMBEDDINGS, RESULT, run_folder

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [CHECKPOINT, ".", EMBEDDINGS])
def test_a_finished_run_evaluates_to_its_own_result(finished: Path, name: str) -> None:
    run = run_folder(finished, "gap", 1)
    metrics = evaluate_file(run / name, "text", None, CPU)
    result = json.loads((run / RESULT).read_text())["metrics"]
    assert metrics.keys() == result.keys()
    # The threads may differ from those of training, hence the last digits.
    assert metrics == pytest.approx(result, rel=1e-3, abs=1e-3)


def test_the_anchor_of_a_checkpoint_is_that_of_its_configuration(finished: Path) -> None:
    metrics = evaluate_file(run_folder(finished, "gap", 0) / CHECKPOINT, None, None, CPU)
    assert "image_to_text/R@1" in metrics


def test_an_unknown_anchor_is_named(finished: Path) -> None:
    with pytest.raises(UserError, match="unknown anchor 'audio'; modalities: image, text"):
        evaluate_file(run_folder(finished, "gap", 0) / EMBEDDINGS, "audio", None, CPU)


def test_a_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is not a checkpoint of this version"):
        evaluate_file(tmp_path / "other.pt", None, None, CPU)


def test_auto_takes_bfloat16_where_the_processor_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (True, False):
        monkeypatch.setattr(gapkernels.training.evaluation, "multiplies_bfloat16", lambda fast=fast: fast)
        assert compute_precision("auto", CPU) == ("bf16" if fast else "fp32")
        assert compute_precision("bf16", CPU) == "bf16"
        assert compute_precision("fp32", CPU) == "fp32"
    assert compute_precision("auto", torch.device("mps")) == "fp32"


def test_samples_without_a_class_are_counted_aloud(tmp_path, capsys):
    """Label −1 keeps a sample out of clustering, which must not pass unnoticed where −1 was meant as a class."""
    path = tmp_path / "embeddings.npz"
    values = {name: np.random.default_rng(seed).normal(size=(12, 4)) for seed, name in enumerate(("image", "text"))}
    np.savez(path, **values, labels=np.array([0, 1, -1] * 4))
    metrics = evaluate_file(path, None, None, torch.device("cpu"))
    assert 0 <= metrics["v_measure"] <= 1
    assert "4 of 12 samples have label -1, no class" in capsys.readouterr().err
