"""Files of embeddings: one array [N, D] per modality, and optionally `labels`, `ids` and `groups`.

Where the modalities have different numbers of samples, such as images and their captions, each has ids of its own,
`ids/image` and `ids/text`, and rows belong together by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gapkernels.errors import UserError, printable
from gapkernels.training.checkpoint import atomic_write
from gapkernels.training.npz import open_npz

NO_CLASS = -1  # label of a sample that belongs to no class, or to several
SUFFIXES = (".safetensors", ".npz")
NOT_A_MODALITY = ("labels", "ids", "groups")
_IDS_OF = "ids/"


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N samples.

    Args:
        modalities: by modality, each [N, D], any float dtype.
        labels: class of each sample, int64 [N], `NO_CLASS` for none, or None.
        ids: samples with one id are interchangeable in retrieval, int64 [N], or None if each matches itself alone; by
            modality, each [N of the modality], where rows of different modalities belong together by their ids.
        groups: samples of one group share a source and stay on one side of the classifiers' split, int64 [N], or None
            if none do.
    """

    modalities: Mapping[str, Tensor]
    labels: Tensor | None = None
    ids: Tensor | Mapping[str, Tensor] | None = None
    groups: Tensor | None = None


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write a .safetensors file, atomically."""
    from safetensors.torch import save

    arrays = {name: values.contiguous().cpu() for name, values in embeddings.modalities.items()}
    for name in NOT_A_MODALITY:
        values = getattr(embeddings, name)
        if isinstance(values, Tensor):
            arrays[name] = values.cpu().clone()  # labels that are the ids as well: the format takes no shared memory
    with atomic_write(path) as file:
        file.write(save(arrays))


def read_embeddings(path: Path) -> Embeddings:
    """Read a .safetensors or .npz file of embeddings in one space.

    Raises:
        UserError: if the file is missing, damaged, or does not hold two or more modalities of one shape, or of one
            width and with ids each.
    """
    arrays = _read_arrays(path)
    ids = {name.removeprefix(_IDS_OF): arrays.pop(name) for name in list(arrays) if name.startswith(_IDS_OF)}
    features = _check_arrays(path, arrays, same_rows=not ids)
    shapes = {name: list(values.shape) for name, values in features.modalities.items()}
    if len({shape[1] for shape in shapes.values()}) > 1:
        raise UserError(f"{path} must hold two or more arrays of one shape [N, D], one per modality; found {shapes}")
    if not ids:
        return features
    for name in NOT_A_MODALITY:
        if name in arrays:
            raise UserError(f"{path}: `{name}` and `ids/...` do not go together: rows have either one id or one each")
    if set(ids) != set(shapes):
        expected, found = (", ".join(f"`{_IDS_OF}{name}`" for name in names) for names in (shapes, ids))
        raise UserError(f"{path} must hold ids for every modality, {expected}; found {found}")
    checked = {name: _check_numbers(path, f"{_IDS_OF}{name}", ids[name], shapes[name][:1]) for name in shapes}
    return replace(features, ids=checked)


def read_features(path: Path) -> Embeddings:
    """Read a .safetensors or .npz file whose modalities may differ in width.

    Raises:
        UserError: if the file is missing, damaged, does not hold two or more modalities of as many samples, or holds
            numbers that are none in float32, in which they are trained on.
    """
    features = _check_arrays(path, _read_arrays(path), same_rows=True)
    for name, values in features.modalities.items():
        _require_finite(path, name, values, values.float())
    return features


def _read_arrays(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"no embeddings at {path}: expected a {' or '.join(SUFFIXES)} file with one array [N, D] per modality"
        )
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}")
    try:
        return _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    except Exception as error:
        raise UserError(f"cannot read {path} ({printable(' '.join(str(error).split()))})") from error


def _check_arrays(path: Path, arrays: Mapping[str, Tensor], same_rows: bool) -> Embeddings:
    modalities = {name: values for name, values in arrays.items() if name not in NOT_A_MODALITY}
    shapes = {printable(name): list(values.shape) for name, values in modalities.items()}
    samples = next(iter(shapes.values()), [])[:1]
    if (
        len(shapes) < 2
        or any(len(shape) != 2 or 0 in shape for shape in shapes.values())
        or (same_rows and any(shape[:1] != samples for shape in shapes.values()))
    ):
        raise UserError(f"{path} must hold two or more arrays of one shape [N, D], one per modality; found {shapes}")
    for name, values in modalities.items():
        if not values.is_floating_point():
            raise UserError(f"{path}: `{printable(name)}` must hold floating point numbers, found {values.dtype}")
        _require_finite(path, name, values, values.float() if values.dtype.itemsize < 4 else values)
    numbers = {name: _check_numbers(path, name, arrays[name], samples) for name in NOT_A_MODALITY if name in arrays}
    lowest = int(numbers["labels"].min()) if "labels" in numbers else 0
    if lowest < NO_CLASS:
        row = int(numbers["labels"].argmin())
        raise UserError(f"{path}: `labels` must be numbers from 0, or {NO_CLASS} for none, found {lowest} in row {row}")
    return Embeddings(modalities, numbers.get("labels"), numbers.get("ids"), numbers.get("groups"))


def _require_finite(path: Path, name: str, values: Tensor, converted: Tensor) -> None:
    """Raise where `converted`, the values in another type, is not finite, with the place of the first such value."""
    finite = converted.isfinite()
    if not finite.all():
        row, column = finite.logical_not().nonzero()[0].tolist()
        found = values[row, column].item()
        raise UserError(f"{path}: `{printable(name)}` must be finite, found {found} in row {row}, column {column}")


def _check_numbers(path: Path, name: str, values: Tensor, shape: list[int]) -> Tensor:
    """Return labels, ids or groups as int64."""
    if list(values.shape) != shape:
        raise UserError(f"{path}: `{printable(name)}` must have shape {shape}, found {list(values.shape)}")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise UserError(f"{path}: `{printable(name)}` must hold whole numbers, found {values.dtype}")
    numbers = values.to(torch.int64)
    if values.dtype == torch.uint64 and bool((numbers < 0).any()):
        raise UserError(f"{path}: `{printable(name)}` must be below 2^63, found {values.numpy().max()}")
    return numbers


def _read_npz(path: Path) -> dict[str, Tensor]:
    with open_npz(path) as file:
        arrays = {name: file[name] for name in file.files}
    # The ids of all modalities have one numbering, anything else has its own.
    ids = [values.ravel() for name, values in arrays.items() if name.startswith(_IDS_OF)]
    if len({_is_text(values) for values in ids}) > 1:
        raise ValueError("ids must not be numbers in one and names in another modality")
    joint = np.concatenate(ids) if ids else np.empty(0)
    return {name: torch.from_numpy(_numbers(a, joint if name.startswith(_IDS_OF) else a)) for name, a in arrays.items()}


def _is_text(values: np.ndarray) -> bool:
    return values.dtype.kind == "U"


def _numbers(values: np.ndarray, vocabulary: np.ndarray) -> np.ndarray:
    """Replace names by their numbers in alphabetical order; bring numbers into the byte order of this computer."""
    if _is_text(values):
        return np.searchsorted(np.unique(vocabulary), values)
    return values.astype(values.dtype.newbyteorder("="))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
