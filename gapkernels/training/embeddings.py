"""Files of embeddings: one array [N, D] per modality, and optionally `labels`, `ids` and `groups`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gapkernels.errors import UserError
from gapkernels.training.checkpoint import atomic_write
from gapkernels.training.npz import open_npz

SUFFIXES = (".safetensors", ".npz")
_NOT_A_MODALITY = ("labels", "ids", "groups")


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N samples.

    Args:
        modalities: by modality, each [N, D], any float dtype.
        labels: class of each sample, int64 [N], or None.
        ids: samples with one id are interchangeable in retrieval, int64 [N], or None if each matches itself alone.
        groups: samples of one group share a source and stay on one side of the classifiers' split, int64 [N], or None
            if none do.
    """

    modalities: Mapping[str, Tensor]
    labels: Tensor | None = None
    ids: Tensor | None = None
    groups: Tensor | None = None


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write a .safetensors file, atomically."""
    from safetensors.torch import save

    arrays = {name: values.contiguous().cpu() for name, values in embeddings.modalities.items()}
    for name in _NOT_A_MODALITY:
        values = getattr(embeddings, name)
        if values is not None:
            arrays[name] = values.cpu().clone()  # labels that are the ids as well: the format takes no shared memory
    with atomic_write(path) as file:
        file.write(save(arrays))


def read_embeddings(path: Path) -> Embeddings:
    """Read a .safetensors or .npz file of embeddings in one space.

    Raises:
        UserError: if the file is missing, damaged, or does not hold two or more modalities of one shape.
    """
    features = read_features(path)
    shapes = {name: list(values.shape) for name, values in features.modalities.items()}
    if len({shape[1] for shape in shapes.values()}) > 1:
        raise UserError(f"{path} must hold two or more arrays of one shape [N, D], one per modality; found {shapes}")
    return features


def read_features(path: Path) -> Embeddings:
    """Read a .safetensors or .npz file whose modalities may differ in width.

    Raises:
        UserError: if the file is missing, damaged, or does not hold two or more modalities of as many samples.
    """
    if not path.is_file():
        raise UserError(
            f"no embeddings at {path}: expected a {' or '.join(SUFFIXES)} file with one array [N, D] per modality"
        )
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}")
    try:
        arrays = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    except Exception as error:
        raise UserError(f"cannot read {path} ({' '.join(str(error).split())})") from error

    modalities = {name: values for name, values in arrays.items() if name not in _NOT_A_MODALITY}
    shapes = {name: list(values.shape) for name, values in modalities.items()}
    samples = next(iter(shapes.values()), [])[:1]
    if len(shapes) < 2 or any(len(shape) != 2 or shape[:1] != samples for shape in shapes.values()):
        raise UserError(f"{path} must hold two or more arrays of one shape [N, D], one per modality; found {shapes}")
    for name, values in modalities.items():
        if not values.is_floating_point():
            raise UserError(f"{path}: `{name}` must hold floating point numbers, found {values.dtype}")
    for name in _NOT_A_MODALITY:
        if name in arrays and list(arrays[name].shape) != samples:
            raise UserError(f"{path}: `{name}` must have shape {samples}, found {list(arrays[name].shape)}")
    return Embeddings(modalities, arrays.get("labels"), arrays.get("ids"), arrays.get("groups"))


def _read_npz(path: Path) -> dict[str, Tensor]:
    with open_npz(path) as file:
        return {name: torch.from_numpy(_numbers(file[name])) for name in file.files}


def _numbers(values: np.ndarray) -> np.ndarray:
    """Replace class names by class numbers, in alphabetical order."""
    return np.unique(values, return_inverse=True)[1].reshape(values.shape) if values.dtype.kind == "U" else values


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
