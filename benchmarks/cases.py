"""What is measured, as data: a case, its count of operations, and the tables of cases for each kind of device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

GAP = "gap"
INFO_NCE = "info_nce"
# Options of InfoNCE: the products of N×N×D that each needs, forward and with the backward pass. A matrix takes one
# forward and three backward (logits again, two gradients); a bank, which has no gradient, one less.
OPTIONS: dict[str, tuple[int, int]] = {
    "negatives": (2, 7),
    "own-negatives": (1, 4),
    "ids": (1, 4),
    "ids-positive": (1, 4),
    "margin": (1, 4),
    "from-anchor": (1, 4),
    "same-side": (3, 12),
    "joint": (3, 12),
    "decoupled": (1, 4),
    "smoothing": (1, 4),
    "sigmoid": (1, 4),
}
OPTION_LOSSES = tuple(f"{INFO_NCE}+{option}" for option in OPTIONS)


def option_of(loss: str) -> str:
    """The key of ``OPTIONS`` in the name of a loss; "" for none."""
    return loss.partition("+")[2]


@dataclass(frozen=True)
class Case:
    """One implementation on one problem.

    Args:
        implementation: name in ``benchmarks.implementations.IMPLEMENTATIONS``.
        loss: ``"gap"`` (InfoNCE + align true pairs + centroid uniformity), ``"info_nce"``, or one of ``OPTION_LOSSES``.
        samples: N.
        width: D.
        dtype: of the embeddings, as torch spells it.
        modalities: M; the first one is the anchor.
        backward: whether the gradients are computed too.
        slow: takes minutes, and is measured only when asked for.
    """

    implementation: str
    loss: str = GAP
    samples: int = 4096
    width: int = 512
    dtype: str = "float32"
    modalities: int = 2
    backward: bool = True
    slow: bool = False

    @property
    def problem(self) -> str:
        """What is computed, without who computes it."""
        scope = "forward+backward" if self.backward else "forward"
        return f"{self.loss}-N{self.samples}-D{self.width}-{self.dtype}-M{self.modalities}-{scope}"

    @property
    def id(self) -> str:
        return f"{self.problem}-{self.implementation}"

    def operations(self) -> int:
        """Floating-point operations of the products that this problem needs; exponentials and O(N·D) work are free.

        A pair of modalities takes 2N²D forward and 6N²D backward (logits again, two gradients); the centroid
        uniformity uses one triangle of a symmetric matrix and takes half of that.
        """
        pairs = self.modalities - 1
        if option_of(self.loss):
            return 2 * self.samples**2 * self.width * OPTIONS[option_of(self.loss)][self.backward] * pairs
        unit = self.samples**2 * self.width * (4 if self.backward else 1)
        return unit * (2 * pairs + (1 if self.loss == GAP else 0))

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that a backward pass must leave behind."""
        itemsize = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        return self.samples * self.width * self.modalities * itemsize if self.backward else 0


@dataclass(frozen=True)
class Grid:
    """The product of its columns, implementation by implementation, N ascending."""

    implementations: Sequence[str]
    loss: Sequence[str] = (GAP,)
    width: Sequence[int] = (512,)
    dtype: Sequence[str] = ("float32",)
    modalities: Sequence[int] = (2,)
    backward: Sequence[bool] = (True,)
    samples: Sequence[int] = (4096,)
    slow: bool = False

    def cases(self) -> Iterator[Case]:
        columns = ("implementation", "loss", "width", "dtype", "modalities", "backward", "samples")
        table = (self.implementations, self.loss, self.width, self.dtype, self.modalities, self.backward, self.samples)
        for values in product(*table):
            row: dict[str, Any] = dict(zip(columns, values, strict=True))
            yield Case(**row, slow=self.slow)


def powers_of_two(first: int, last: int, step: int = 1) -> list[int]:
    """2^first, …, 2^last."""
    return [2**exponent for exponent in range(first, last + 1, step)]


# Groups of implementations: each entry of benchmarks.implementations names its own, so that no table need name it.
OURS, COMPILED, LIBRARIES = "gapkernels", "compiled", "libraries"

# torch.compile takes half a minute for every new shape on two cores, so it gets fewer of them. The libraries get a
# small problem first, from which one that would take minutes on the larger one is known.
CPU: dict[str, list[Grid]] = {
    "peers": [
        Grid((OURS, "authors", "authors-compile", "matmul", COMPILED), backward=(True, False)),
        Grid((OURS, "authors", LIBRARIES), loss=(INFO_NCE,), samples=(256, 4096)),
    ],
    "scaling": [
        Grid((OURS, "authors", "matmul"), samples=powers_of_two(8, 17)),
        Grid(("authors-compile", COMPILED), samples=powers_of_two(8, 12, step=2)),
        Grid((LIBRARIES,), loss=(INFO_NCE,), samples=powers_of_two(8, 11)),
    ],
    "width": [Grid((OURS, "authors", "matmul"), width=powers_of_two(6, 10))],
    "small": [
        Grid(
            (OURS, "matmul", "matmul-compile"),
            width=(64, 128, 512, 768),
            samples=(16, 128, 512),
            dtype=("float32", "bfloat16"),
        )
    ],
    "types": [
        Grid((OURS, "matmul", COMPILED), samples=(256, 1024, 4096), dtype=("bfloat16",)),
        Grid((OURS,), samples=(8192,), dtype=("float32", "bfloat16", "float16")),
        Grid((OURS,), samples=(16384,), dtype=("bfloat16",)),
        Grid(("authors",), dtype=("bfloat16",)),
    ],
    "modalities": [Grid((OURS, "authors"), modalities=(3, 4))],
    "options": [
        Grid((OURS, "dense"), loss=OPTION_LOSSES, dtype=("float32", "bfloat16")),
    ],
    "large": [Grid((OURS,), width=(256,), samples=(65536,), dtype=("float32", "bfloat16"), slow=True)],
}

# Time is dear on a GPU and may end anywhere: what matters most comes first, and that is what the project has set itself
# figures for. Two sizes with the authors' formulation, as the backward pass of torch.pdist wants 4N²D bytes on a GPU
# (34 GB at N = 4096, D = 512), so that nobody but us and matrix products can do the larger one.
GPU: dict[str, list[Grid]] = {
    "targets": [
        Grid((OURS, "matmul", COMPILED), samples=(32768,), dtype=("bfloat16",)),
        Grid((OURS, "authors"), samples=(4096,), dtype=("bfloat16",)),
        Grid((OURS, "siglip-kernel", "inf-cl"), loss=(INFO_NCE,), samples=(65536,), width=(768,), dtype=("bfloat16",)),
        Grid((OURS, "matmul"), samples=(256, 1024, 2048), dtype=("bfloat16",)),
        Grid((OURS,), samples=(2**20,), dtype=("bfloat16",)),
        Grid((COMPILED,), samples=(256, 2048), dtype=("bfloat16",)),
    ],
    "peers": [
        Grid((OURS, "authors", "matmul"), samples=(4096, 32768), dtype=("bfloat16",), backward=(True, False)),
        Grid(
            (OURS, "authors", LIBRARIES),
            loss=(INFO_NCE,),
            samples=(4096, 32768, 65536),
            width=(768,),
            dtype=("bfloat16",),
        ),
        Grid(("authors-compile", COMPILED), samples=(4096, 32768), dtype=("bfloat16",)),
    ],
    "scaling": [
        Grid((OURS, "authors", "matmul"), samples=powers_of_two(8, 18), dtype=("bfloat16",)),
        Grid((OURS, LIBRARIES), loss=(INFO_NCE,), samples=powers_of_two(8, 18, step=2), dtype=("bfloat16",)),
        Grid((OURS,), samples=powers_of_two(19, 20), dtype=("bfloat16",)),
        Grid(("authors-compile", COMPILED), samples=(256, 1024, 2048, 16384), dtype=("bfloat16",)),
    ],
    "width": [
        Grid((OURS, "matmul"), samples=(32768,), width=(64, 128, 256, 384, 512, 768, 1024, 1536), dtype=("bfloat16",))
    ],
    "types": [
        Grid((OURS, "matmul"), samples=(16384,), dtype=("float32", "bfloat16", "float16")),
        Grid((OURS, LIBRARIES), loss=(INFO_NCE,), samples=(4096,), width=(128,)),  # not all take bfloat16
    ],
    "modalities": [Grid((OURS, "authors"), samples=(16384,), dtype=("bfloat16",), modalities=(3, 4))],
    "options": [Grid((OURS, "dense"), loss=OPTION_LOSSES, samples=(4096, 16384), dtype=("bfloat16",))],
}

# Measured only when asked for by name: problems on which one kernel or another may win, by N, D and type.
KERNELS = "kernels"
ON_REQUEST: dict[str, dict[str, list[Grid]]] = {
    "cpu": {KERNELS: [Grid((OURS,), samples=(512, 2048), width=(128, 512))]},
    "cuda": {
        KERNELS: [
            Grid((OURS,), samples=(1024, 4096, 32768), width=(128, 512), dtype=("bfloat16",)),
            Grid((OURS,), samples=(4096, 32768), width=(64, 256, 1024), dtype=("bfloat16",)),
            Grid((OURS,), loss=(INFO_NCE,), samples=(65536,), width=(768,), dtype=("bfloat16",)),
            Grid((OURS,), samples=(16384,), dtype=("float16", "float32")),
        ],
    },
}


def table_of(device_type: str) -> dict[str, list[Grid]]:
    """The suites of a kind of device."""
    return GPU if device_type == "cuda" else CPU


def cases(
    suites: Iterable[str], table: Mapping[str, Sequence[Grid]], groups: Mapping[str, Sequence[str]]
) -> list[Case]:
    """The cases of some suites, each problem once, with a group replaced by its members.

    Args:
        suites: keys of ``table``.
        table: ``CPU`` or ``GPU``.
        groups: names of implementations by group, see ``benchmarks.implementations.groups``.
    """
    found: dict[Case, None] = {}
    for suite in suites:
        for grid in table[suite]:
            for case in grid.cases():
                names = groups.get(case.implementation, [case.implementation])
                found.update(dict.fromkeys(replace(case, implementation=name) for name in names))
    return list(found)
