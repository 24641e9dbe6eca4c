"""Tile shapes and schedules, keyed by kernel, architecture, length of the rows and type of the operands.

The table holds one default per key. With GAPKERNELS_TUNE=1 the candidates of a key are timed once at first use and the
fastest is remembered in a file (GAPKERNELS_TUNING_FILE, by default in the user's cache directory), which later
processes go by whether they tune or not. Nothing else is ever compiled twice, and no key depends on the batch size.
"""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from gapkernels.backends.triton.architectures import Config, nearest
from gapkernels.backends.triton.device import INTERPRETED, architecture, next_power_of_2

INTERPRETER = Config(32, 64, 64, 4, 1, group=2)
# True float32 products run on the ordinary units, where a large tile only costs registers.
_FLOAT32 = [Config(64, 64, 32, 4, 3, programs_per_processor=4)]
_FLOAT32_TENSOR = [Config(128, 128, 32, 8, 3), Config(128, 64, 32, 4, 3, programs_per_processor=2)]


def candidates(kernel: str, arch: str, dtype: torch.dtype, dim: int) -> tuple[Config, ...]:
    """The configurations to choose from; the first is the default."""
    if arch == "interpreter":
        return (INTERPRETER,)
    return _candidates(kernel, arch, dtype, dim, torch.get_float32_matmul_precision() == "highest")


@functools.cache
def _candidates(kernel: str, arch: str, dtype: torch.dtype, dim: int, true_float32: bool) -> tuple[Config, ...]:
    if dtype == torch.float32:
        table = _FLOAT32 if true_float32 else _FLOAT32_TENSOR
    else:
        row = nearest(arch)
        table = {"gradient_tiles": row.gradients, "both_products": row.products}.get(kernel, row.sums)
        if kernel == "both_products":
            # A tile twice as wide reads H half as often; at D ≤ 256 there would be too few of them.
            table = [c for c in table if c.tile_n <= max(128, dim // 2)]
    if kernel == "log_sums":  # runs rarely; the running maxima and sums leave no room for wide tiles
        rows, warps, parts = (32, 4, 2) if dtype == torch.float32 else (128, 8, nearest(arch).log_sums_parts)
        table = [c._replace(tile_m=rows, tile_n=c.tile_n // parts, num_warps=warps) for c in table[:1]]
    if kernel == "both_products":  # steps go along the block of the gradient, not along rows
        return tuple(table)
    # A step of the K loop longer than a row would be padding.
    shortest = max(16, next_power_of_2(dim))
    return tuple(dict.fromkeys(c._replace(tile_k=min(c.tile_k, shortest)) for c in table))


def choose(
    kernel: str, like: Tensor, launch: Callable[[Config], object], reset: Tensor | tuple[Tensor, ...] | None = None
) -> Config:
    """The configuration of a kernel for operands like these.

    Args:
        kernel: name of the kernel.
        like: an operand ``[n, D]``.
        launch: runs the kernel with a configuration, to time it.
        reset: what a launch adds to, one or several, restored after the timing.
    """
    if INTERPRETED:
        return INTERPRETER
    # Asked at every launch: what is decided once holds for the process.
    found = decided(kernel, like)
    if found is None:
        found = _choose(kernel, like, launch, reset)
        if not (_searching() and torch.cuda.is_current_stream_capturing()):
            _decided[_question(kernel, like)] = found
    return found


def decided(kernel: str, like: Tensor) -> Config | None:
    """What ``choose`` has chosen for operands like these; None before it has."""
    return _decided.get(_question(kernel, like))


def _question(kernel: str, like: Tensor) -> tuple[object, ...]:
    return kernel, like.device, like.dtype, like.shape[1], torch.get_float32_matmul_precision()


_decided: dict[tuple[object, ...], Config] = {}


def forget() -> None:
    """Forget what was decided and read, as a new process would begin."""
    _decided.clear()
    _remembered.cache_clear()


def _choose(
    kernel: str, like: Tensor, launch: Callable[[Config], object], reset: Tensor | tuple[Tensor, ...] | None
) -> Config:
    arch, dim = architecture(like.device), like.shape[1]
    options = candidates(kernel, arch, like.dtype, dim)
    if len(options) == 1:
        return options[0]
    key = _key(kernel, arch, like.dtype, next_power_of_2(dim))
    found = _remembered().get(key)
    if found in options:
        return found
    if not _searching() or torch.cuda.is_current_stream_capturing():
        return options[0]
    changed = (reset,) if isinstance(reset, Tensor) else reset or ()
    kept = [tensor.clone() for tensor in changed]
    times = {config: _time(launch, config) for config in options}
    for tensor, value in zip(changed, kept, strict=True):
        tensor.copy_(value)
    found = min(times, key=times.__getitem__)
    _remembered()[key] = found
    _write({key: found})
    return found


def _key(kernel: str, arch: str, dtype: torch.dtype, dim: int) -> str:
    return f"{kernel}/{arch}/{dtype}/{dim}/{triton.__version__}"


def _time(launch: Callable[[Config], object], config: Config) -> float:
    """Median milliseconds; infinite where the device cannot hold the configuration or the compiler cannot make it."""
    errors = triton.runtime.errors
    try:
        return triton.testing.do_bench(lambda: launch(config), warmup=5, rep=30, return_mode="median")
    except (errors.OutOfResources, errors.PTXASError, triton.CompilationError):
        return math.inf


def _searching() -> bool:
    return not INTERPRETED and os.environ.get("GAPKERNELS_TUNE") == "1"


def _file() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("GAPKERNELS_TUNING_FILE", cache / "gapkernels" / "tuning.json"))


@functools.cache
def _remembered() -> dict[str, Config]:
    return {} if INTERPRETED else _read()


def _read() -> dict[str, Config]:
    """What is in the file; of another version's entries those that say the same as ours."""
    if not _file().exists():
        return {}
    entries = json.loads(_file().read_text(encoding="utf-8"))
    return {key: Config(**value) for key, value in entries.items() if set(value) == set(Config._fields)}


def _write(found: dict[str, Config]) -> None:
    """Add to the file what this process found, to what others may have found meanwhile."""
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = _read() | found
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({key: config._asdict() for key, config in table.items()}, indent=2) + "\n")
        temporary.replace(file)
