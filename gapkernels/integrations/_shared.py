"""What the drop-ins have in common: the class that each takes the place of."""

from __future__ import annotations

import importlib
import warnings

from torch import nn


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
