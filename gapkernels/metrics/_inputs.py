"""What the metrics share: checked, normalised rows, integer codes for labels and ids, and tiles."""

import operator
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

Labels: TypeAlias = torch.Tensor | np.ndarray | Sequence[int] | Sequence[str]

# Edge of the square tiles of similarities: 8 MiB in float64, large enough for matmul to run at full speed on a CPU.
TILE = 1024


def tiles(rows: int) -> Iterator[slice]:
    """Cut `rows` rows into consecutive slices of at most TILE."""
    return (slice(start, min(start + TILE, rows)) for start in range(0, rows, TILE))


def check_rows(**embeddings: torch.Tensor) -> None:
    """Raise unless every argument is a floating point tensor [N, D] with at least one row and one column."""
    for name, value in embeddings.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`{name}` must be a floating point tensor [N, D], got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"`{name}` must be a floating point tensor [N, D], got dtype {value.dtype}")
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(f"`{name}` must be [N, D] with N >= 1 and D >= 1, got shape {list(value.shape)}")


def check_alike(names: Sequence[str], embeddings: Sequence[torch.Tensor]) -> None:
    """Raise unless all embeddings are [N, D] of one shape on one device."""
    first = embeddings[0]
    for name, value in zip(names, embeddings, strict=True):
        check_rows(**{name: value})
        if value.shape != first.shape:
            raise ValueError(
                f"`{name}` must have the shape of `{names[0]}`, {list(first.shape)}, got shape {list(value.shape)}"
            )
        check_device(name, value, names[0], first)


def check_device(name: str, value: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    """Raise unless the two tensors are on one device."""
    if value.device != first.device:
        raise ValueError(f"`{name}` must be on the device of `{first_name}`, {first.device}, got {value.device}")


def check_finite(name: str, embedding: torch.Tensor) -> None:
    """Raise if a row holds NaN, which would win or lose every comparison in silence, or infinity."""
    finite = embedding.isfinite().all(dim=1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        kind = "NaN" if embedding[row].isnan().any() else "an infinite value"
        raise ValueError(f"`{name}` must be finite, got {kind} in row {row}")


def several(embeddings: Sequence[torch.Tensor]) -> list[str]:
    """Check positional `*embeddings` (two or more, alike) and return the names that messages use for them."""
    if len(embeddings) < 2:
        raise ValueError(f"`embeddings` must be at least 2 tensors, one per modality, got {len(embeddings)}")
    names = [f"embeddings[{index}]" for index in range(len(embeddings))]
    check_alike(names, embeddings)
    return names


def unit_rows(name: str, embedding: torch.Tensor) -> torch.Tensor:
    """Return the rows of a checked embedding in float64, divided by max(norm, 1e-12).

    float64 is what makes ranks trustworthy: torch's TF32 and bf16 matmul switches and autocast leave it alone, and
    rounding (about 1e-16) is far below the differences that float32 embeddings can express.
    """
    if embedding.device.type == "mps":  # has no float64
        embedding = embedding.cpu()
    wide = embedding.to(torch.float64)
    check_finite(name, wide)
    return F.normalize(wide, dim=1, eps=1e-12)


def positive_int(name: str, value: int) -> int:
    """Return `value` as an int, or raise unless it is an integer >= 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer >= 1, got {value!r}") from None
    if number < 1:
        raise ValueError(f"`{name}` must be an integer >= 1, got {number}")
    return number


def label_array(name: str, values: Labels, rows: int) -> np.ndarray:
    """Return labels or ids as a one-dimensional array of integers or of strings, one entry per row."""
    if isinstance(values, torch.Tensor):
        if values.is_floating_point() or values.is_complex():  # before numpy, which does not know bfloat16
            raise TypeError(f"`{name}` must hold integers or strings, got dtype {values.dtype}")
        values = values.cpu().numpy()
    array = np.asarray(values)
    if array.shape != (rows,):
        raise ValueError(f"`{name}` must have {rows} entries, one per row, got shape {list(array.shape)}")
    if array.dtype.kind in "OT" and all(isinstance(value, str) for value in array):
        array = array.astype(str)  # columns of data frames hold their strings as objects
    if array.dtype.kind not in "iubU":
        raise TypeError(f"`{name}` must hold integers or strings, got dtype {array.dtype}")
    return array


def joint_codes(**arrays: np.ndarray) -> list[np.ndarray]:
    """Number the distinct values over all arrays 0, 1, 2, ... and return each array as those int64 numbers."""
    (first_name, first), *others = arrays.items()
    for name, array in others:
        # numpy would turn the integers into strings, so that 1 and "1" would count as one value.
        if (array.dtype.kind == "U") != (first.dtype.kind == "U"):
            raise TypeError(
                f"`{name}` must hold the same kind of values as `{first_name}`, {first.dtype}, got {array.dtype}"
            )
    merged = np.concatenate(list(arrays.values()))
    if merged.dtype.kind == "f":  # int64 with uint64: numpy's common type would merge large values that differ
        merged = np.concatenate([array.astype(object) for array in arrays.values()])
    codes = np.unique(merged, return_inverse=True)[1].astype(np.int64)
    return np.split(codes, np.cumsum([len(array) for array in arrays.values()])[:-1])
