"""Checks of arguments that several public functions share, and numbers as tensors."""

from __future__ import annotations

import functools
import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from gapkernels import backends
from gapkernels.backends.contract import statistics_dtype
from gapkernels.distributed import DTYPES

DEFAULT_TEMPERATURE = 0.07  # CLIP's initial value


def as_tensor(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(()).to(device, statistics_dtype(device))
    return constant(value, device)


def is_tracing() -> bool:
    """Whether torch.compile or a dispatch mode looks on: what a call keeps for the next must then not be used."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def constant(value: float | tuple[float, ...], device: torch.device) -> Tensor:
    """A number or some as a tensor in the statistics type. Eager calls keep it: on a GPU it is copied from the host."""
    if not is_tracing():
        return _kept_constant(value, device)
    # A number that changes between calls is a symbol here: a product takes it as one, torch.full and torch.tensor
    # would compile anew for every value or, without gradients, keep an old one.
    one = torch.ones((), dtype=statistics_dtype(device), device=device)
    return torch.stack([one * v for v in value]) if isinstance(value, tuple) else one * value


@functools.lru_cache(maxsize=256)
def _kept_constant(value: float | tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or no later call could differentiate through it
        return torch.tensor(value, dtype=statistics_dtype(device), device=device)


def check_rows(name: str, x: Tensor, may_be_empty: bool = False) -> None:
    """Raise unless ``x`` is ``[N, D]`` of a type that the loss takes, on this process alone."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    refuse_dtensor(name, x, "its local rows (to_local()) with group= its mesh's group (get_group())")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {name_of(x.dtype)}")
    if x.dim() != 2 or x.shape[1] == 0 or (x.shape[0] == 0 and not may_be_empty):
        raise ValueError(f"{name} must have shape [N, D] with N, D ≥ 1, got {list(x.shape)}")


def check_vector(name: str, x: Tensor, length: int, like: Tensor, integer: bool) -> None:
    """Raise unless ``x`` is ``[length]``, int64 or floating, on the device of ``like``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")
    if list(x.shape) != [length] or (x.dtype != torch.int64 if integer else not x.is_floating_point()):
        kind = "int64" if integer else "floating"
        raise ValueError(
            f"`{name}` must be {kind} of shape [{length}], got {name_of(x.dtype)} of shape {list(x.shape)}"
        )
    if x.device != like.device:
        raise ValueError(f"`{name}` must be on the embeddings' device {like.device}, got {x.device}")


def check_scalar(name: str, value: float | Tensor, positive: bool = True) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"`{name}` must be a number or a floating tensor of one element, got {name_of(value.dtype)} of shape "
                f"{list(value.shape)}"
            )
        refuse_dtensor(f"`{name}`", value, "its full_tensor()")
        if positive and is_readable(value):
            number = value.item()
            if number <= 0 or number == math.inf:  # not a number passes: a training that diverged says so in its loss
                which = f"`{name}`" if name == "uniformity_t" else "the logit scale (1/temperature)"
                raise ValueError(f"{which} must be {'positive' if number <= 0 else 'finite'}, got {number}")
        return value
    return check_number(name, value, positive=positive)


def refuse_dtensor(name: str, tensor: Tensor, instead: str) -> None:
    if type(tensor).__name__ == "DTensor":
        raise TypeError(f"{name} must be an ordinary tensor, got a DTensor; pass {instead}")


def is_readable(tensor: Tensor) -> bool:
    """Whether a value can be looked at without waiting for a device, and without a tracer or transform in the way."""
    return tensor.device.type == "cpu" and not is_tracing() and not torch._C._are_functorch_transforms_active()


def check_number(name: str, value: float, positive: bool = False) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf or (positive and value <= 0):  # comparisons, which torch.compile can trace
        raise ValueError(f"`{name}` must be {'positive and ' if positive else ''}finite, got {value}")
    return value if torch.compiler.is_compiling() else float(value)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def logit_scale_of(
    logit_scale: float | Tensor | None, temperature: float | Tensor | None, device: torch.device
) -> Tensor:
    if type(logit_scale) in _NUMBER and type(temperature) in _NUMBER and not is_tracing():
        return _kept_logit_scale(logit_scale, temperature, device)
    return _logit_scale_of(logit_scale, temperature, device)


_NUMBER = (float, type(None))


def _logit_scale_of(
    logit_scale: float | Tensor | None, temperature: float | Tensor | None, device: torch.device
) -> Tensor:
    if logit_scale is not None and temperature is not None:
        raise ValueError("give `logit_scale` or `temperature` (its inverse), not both")
    if temperature is None:
        value = 1 / DEFAULT_TEMPERATURE if logit_scale is None else check_scalar("logit_scale", logit_scale)
        return value.reshape(()).to(device) if isinstance(value, Tensor) else constant(value, device)
    value = check_scalar("temperature", temperature)
    if isinstance(value, Tensor):  # inverted in the statistics type: a bfloat16 quotient would be off by 0.4 %
        return value.reshape(()).to(device, statistics_dtype(device)).reciprocal()
    return constant(1 / value, device)


_kept_logit_scale = functools.lru_cache(maxsize=256)(_logit_scale_of)


def check_backend(backend: str) -> str:
    if backend != "auto" and backend not in backends.NAMES:
        raise ValueError(f"`backend` must be 'auto' or one of {', '.join(map(repr, backends.NAMES))}, got {backend!r}")
    return backend
