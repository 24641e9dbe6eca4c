from pathlib import Path

import numpy as np
import pytest
import torch

from gapkernels.errors import UserError
from gapkernels.training.embeddings import Embeddings, read_embeddings, write_embeddings

IMAGE, TEXT = np.eye(4, 3, dtype=np.float32), np.ones((4, 3), dtype=np.float32)


def test_embeddings_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    written = Embeddings(
        {"image": torch.randn(4, 3), "text": torch.randn(4, 3)},
        torch.arange(4),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([5, 6, 6, 7]),
    )
    write_embeddings(path, written)
    read = read_embeddings(path)
    assert set(read.modalities) == {"image", "text"}
    assert all(torch.equal(read.modalities[name], written.modalities[name]) for name in read.modalities)
    assert read.labels is not None
    assert read.ids is not None
    assert read.groups is not None
    assert read.labels.tolist() == [0, 1, 2, 3]
    assert read.ids.tolist() == [0, 0, 1, 1]
    assert read.groups.tolist() == [5, 6, 6, 7]


def test_npz_may_name_the_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", image=IMAGE, text=TEXT, labels=np.array(["dog", "cat", "dog", "ant"]))
    read = read_embeddings(tmp_path / "e.npz")
    assert list(read.modalities) == ["image", "text"]
    assert read.labels is not None
    assert read.labels.tolist() == [2, 1, 2, 0]
    assert read.ids is None
    assert read.groups is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": IMAGE}, "two or more arrays"),
        ({"image": IMAGE, "text": TEXT[:, :2]}, r"one shape \[N, D\].*'text': \[4, 2\]"),
        ({"image": IMAGE.flatten(), "text": TEXT.flatten()}, r"one shape \[N, D\]"),
        ({"image": IMAGE, "text": TEXT.astype(np.int32)}, "`text` must hold floating point numbers"),
        ({"image": IMAGE, "text": TEXT, "labels": np.arange(3)}, r"`labels` must have shape \[4\], found \[3\]"),
        ({"image": IMAGE, "text": np.array([{}] * 4)}, "cannot read"),
    ],
)
def test_a_file_that_does_not_fit_is_explained(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(UserError, match=words) as caught:
        read_embeddings(tmp_path / "e.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["e.npz", "e.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither the one nor the other")
    with pytest.raises(UserError, match=f"cannot read .*{name}") as caught:
        read_embeddings(tmp_path / name)
    assert "pickle" not in str(caught.value)


def test_missing_and_unknown_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no embeddings at .*e\.npz: expected a .* file with one array"):
        read_embeddings(tmp_path / "e.npz")
    (tmp_path / "e.csv").touch()
    with pytest.raises(UserError, match=r"must end in \.safetensors or \.npz"):
        read_embeddings(tmp_path / "e.csv")
