"""Where the CUDA kernels were measured faster than Triton's: there, and only there, ``backend="auto"`` takes them.

    python -m gapkernels.backends.cuda.speed_record benchmarks/results/FILE.json     renews the record

The record is ``speed_record.json``: by architecture and type of the embeddings the smallest batch and the smallest
width from which on the kernels won every problem, and the result file that says so. It is empty until there is one.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

RECORD = Path(__file__).with_name("speed_record.json")
ARCHITECTURE = "sm_90"
"""What the kernels are compiled for; nothing else can have been measured."""


class Region(NamedTuple):
    """Embeddings ``[N, D]`` with ``N >= samples`` and ``D >= width``.

    Attributes:
        samples: smallest batch.
        width: smallest length of an embedding.
        source: the result file, relative to the repository.
    """

    samples: int
    width: int
    source: str

    def holds(self, samples: int, width: int) -> bool:
        """Whether embeddings ``[samples, width]`` belong to it."""
        return samples >= self.samples and width >= self.width


@functools.cache
def regions() -> dict[str, Region]:
    """The record of this architecture, by type (``"bfloat16"``)."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return {dtype: Region(**entry) for dtype, entry in record.get(ARCHITECTURE, {}).items()}


def region(dtype: torch.dtype) -> Region | None:
    """Where the kernels are known to be faster for embeddings of a type; None if nowhere."""
    return regions().get(str(dtype).removeprefix("torch."))


def derive(rows: Sequence[Mapping[str, Any]], source: str) -> dict[str, Region]:
    """The regions that measured rows speak for, by type.

    A problem is won where the median is below Triton's by more than its own interquartile range. Of all regions with
    nothing but won problems the one with most of them is taken.

    Args:
        rows: of a result file of the benchmarks; those under settings of the environment, which are named beside the
            implementation, do not count.
        source: where that file is.
    """
    times: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        problem = tuple(row[name] for name in ("dtype", "samples", "width", "loss", "modalities", "backward"))
        times.setdefault(problem, {})[row["implementation"]] = row
    won: dict[str, dict[tuple[int, int], bool]] = {}
    for (dtype, samples, width, *_), by_backend in times.items():
        ours, triton = by_backend.get("gapkernels-cuda"), by_backend.get("gapkernels-triton")
        if ours is not None and triton is not None:
            size, faster = (samples, width), ours["median"] + ours["iqr"] < triton["median"]
            sizes = won.setdefault(dtype, {})
            sizes[size] = sizes.get(size, True) and faster
    found = {}
    for dtype, sizes in won.items():
        counts = {}
        for n, d in {(n, d) for n, _ in sizes for _, d in sizes}:
            inside = [faster for (samples, width), faster in sizes.items() if samples >= n and width >= d]
            if inside and all(inside):
                counts[n, d] = len(inside)
        if counts:
            # Of several that say the same the one that promises least.
            found[dtype] = Region(*max(counts, key=lambda corner: (counts[corner], corner)), source)
    return found


def main(arguments: Sequence[str]) -> None:
    """Replace the record by what a result file says."""
    if len(arguments) != 1:
        sys.exit("usage: python -m gapkernels.backends.cuda.speed_record FILE, a result file of the benchmarks")
    content = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    found = derive([entry["extra_info"] for entry in content["benchmarks"]], Path(arguments[0]).as_posix())
    record = {ARCHITECTURE: {dtype: entry._asdict() for dtype, entry in found.items()}} if found else {}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(described(found)) or "nowhere faster than Triton: auto stays with Triton")


def described(entries: Mapping[str, Region]) -> list[str]:
    """Regions in words, one for each type."""
    return [f"{dtype} from N = {r.samples}, D = {r.width} on ({r.source})" for dtype, r in entries.items()]


if __name__ == "__main__":
    main(sys.argv[1:])
