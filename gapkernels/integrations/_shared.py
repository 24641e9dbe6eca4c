"""What the drop-ins have in common: the class that each takes the place of, and what they do with a batch of one."""

from __future__ import annotations

import importlib
import warnings

from torch import Tensor, nn


def replaced_class(module: str, name: str) -> type[nn.Module]:
    """The class of another library that a drop-in derives from, so that ``isinstance`` holds there.

    Args:
        module: where the library defines it.
        name: of the class.

    Returns:
        The class, or ``nn.Module`` where the library is not installed or has no such class (any more). A library that
        is installed and cannot be imported is warned of.
    """
    package = module.partition(".")[0]
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name == package or (error.name or "").startswith(f"{package}."):
            return nn.Module
        failure: Exception = error
    except Exception as error:  # whatever another library does while it is imported
        failure = error
    else:
        return found if isinstance(found, type) and issubclass(found, nn.Module) else nn.Module
    warnings.warn(
        f"{package} is installed but cannot be imported ({type(failure).__name__}: {failure}); the {name} of "
        f"gapkernels computes the same, but is no subclass of {package}'s",
        stacklevel=3,
    )
    return nn.Module


def is_on(weight: float | Tensor) -> bool:
    """Whether a term with this weight is computed."""
    return isinstance(weight, Tensor) or weight != 0


def centroid_weight(loss: nn.Module, cu_weight: float | Tensor, samples: int) -> float | Tensor:
    """The weight of the centroid uniformity in a batch of so many samples of all processes.

    Trainers keep the last incomplete batch, where one sample may be left. The losses replaced here are zero for it; the
    centroid uniformity, a mean over pairs, does not exist. It is left out of that batch, and `loss` warns once.
    """
    if samples > 1 or not is_on(cu_weight):
        return cu_weight
    if not getattr(loss, "_warned_of_one_sample", False):
        loss._warned_of_one_sample = True  # type: ignore[assignment]
        warnings.warn(
            "the batch holds one sample: the centroid uniformity, which is over pairs of samples, is left out of it; "
            "drop the last incomplete batch to avoid that",
            stacklevel=3,
        )
    return 0.0
