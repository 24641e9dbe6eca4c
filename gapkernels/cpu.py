"""Which processor this is: what reports print and what choosing a library of matrix products depends on."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


@functools.cache
def _fields() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {}
    lines = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_model() -> str:
    """The processor's name, with family and model where the name alone ("AMD EPYC") leaves the generation open."""
    fields = _fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields.get('model')})"
    return name


def is_amd() -> bool:
    """Whether the processor is AMD's, as far as the operating system tells."""
    return _fields().get("vendor_id") == "AuthenticAMD"


def has(flag: str) -> bool:
    """Whether the processor has a feature, by its name in /proc/cpuinfo: ``avx512_bf16``."""
    return flag in _fields().get("flags", "").split()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 are faster than those of float32, as far as the system tells.

    AMX makes them so, and AMD's AVX-512. Intel's takes twice the time that float32 takes (on an Emerald Rapids).
    """
    return has("amx_bf16") or (has("avx512_bf16") and is_amd())
