"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, matrix instructions.

    python -m gapkernels.backends.triton.resources [sm_90 …]     prints a table of all configurations

The kernels are compiled with the types and constants that a launch for two modalities uses; the binaries are read with
the cuobjdump that comes with Triton.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.gradient_rows import Partner, gradient_rows_kernel, row_length
from gapkernels.backends.triton.gradient_tiles import gradient_tiles_kernel
from gapkernels.backends.triton.log_sums import log_sums_kernel
from gapkernels.backends.triton.pair_weights import BLOCK as WEIGHTS_BLOCK
from gapkernels.backends.triton.pair_weights import NUM_WARPS as WEIGHTS_WARPS
from gapkernels.backends.triton.pair_weights import pair_weights_kernel, scale_gradient_kernel
from gapkernels.backends.triton.products import add_product_kernel
from gapkernels.backends.triton.row_gradients import row_gradients_kernel
from gapkernels.backends.triton.row_statistics import centroids_kernel, operands_kernel, row_statistics_kernel
from gapkernels.backends.triton.terms import BLOCK, combine_kernel, row_terms_kernel
from gapkernels.backends.triton.tile_sums import tile_sums_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes that one program may use, from the vendors' documentation."""

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}


class Source(NamedTuple):
    """A kernel with everything its compilation depends on.

    Attributes:
        name: of the kernel and its variant.
        kernel: the kernel.
        types: per argument its type ("*bf16", "i32", …), a tuple of them, or None for an absent tensor.
        constants: the compile-time arguments.
        config: warps and stages, and tiles if it has any; None for the compiler's defaults.
    """

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    config: tuning.Config | None = None


class Resources(NamedTuple):
    """What a compiled kernel needs; registers and spilled bytes per thread, None where they cannot be read."""

    registers: int | None
    spilled: int | None
    shared: int
    assembly: str


def matrix_kernels(arch: str, dtype: torch.dtype = torch.bfloat16, dim: int = 512) -> Iterator[Source]:
    """Every configuration of the kernels with matrix products."""
    operand, centroid = _TYPES[dtype], _TYPES[torch.float32 if dtype == torch.float32 else torch.float16]
    precision = "ieee" if dtype == torch.float32 else "tf32"

    def common(config: tuning.Config) -> dict[str, Any]:
        return {
            "TILE_M": config.tile_m,
            "TILE_N": config.tile_n,
            "TILE_K": config.tile_k,
            "EVEN_K": dim % config.tile_k == 0,
            "PRECISION": precision,
        }

    pair_and_triangle = {
        "rows": (operand, centroid),
        "row_strides": ("i32",) * 2,
        "row_factors": ("*fp32",) * 2,
        "cols": (operand, centroid),
        "col_strides": ("i32",) * 2,
        "col_factors": ("*fp32",) * 2,
        "scales": ("*fp32", "*fp32"),
        "largest": None,
        "row_sums": "*fp32",
        "col_sums": "*fp32",
    }
    sizes = {"num_rows": "i32", "num_cols": "i32", "dim": "i32", "diagonal": "i32"}
    kinds = {"BIASED": (False, True), "SYMMETRIC": (False, True), "UNIT": True}
    for config in tuning.candidates("tile_sums", arch, dtype, dim):
        yield Source(
            "tile_sums",
            tile_sums_kernel,
            {**pair_and_triangle, **sizes, "headroom": "fp32"},
            {**kinds, **common(config), "GROUP": config.group, "USE_TMA": config.tma},
            config,
        )
    for recompute in (False, True):
        sums: dict[str, Any] = {"row_sums": None, "col_sums": None} if recompute else {}
        for config in tuning.candidates("log_sums", arch, dtype, dim):
            yield Source(
                "log_sums, all computed anew" if recompute else "log_sums",
                log_sums_kernel,
                {
                    **pair_and_triangle,
                    **sums,
                    "row_log_sums": "*fp64",
                    "col_log_sums": "*fp64",
                    **sizes,
                    "headroom": "fp32",
                    "smallest_exact": "fp32",
                },
                {**kinds, **common(config), "RECOMPUTE": recompute},
                config,
            )
    for biased in (False, True):
        kind = centroid if biased else operand
        for config in tuning.candidates("gradient_tiles", arch, dtype, dim):
            yield Source(
                f"gradient_tiles, {'centroids' if biased else 'pair'}",
                gradient_tiles_kernel,
                {
                    "rows": kind,
                    "row_stride": "i32",
                    "row_factors": "*fp32",
                    "row_log_sums": None if biased else "*fp32",
                    "cols": kind,
                    "col_stride": "i32",
                    "col_factors": "*fp32",
                    "col_log_sums": None if biased else "*fp32",
                    "scale_pointer": "*fp32",
                    "reference": "*fp32",
                    "out": kind,
                    "out_stride": "i32",
                    "scale_partials": None if biased else "*fp64",
                    **sizes,
                    "unit": "fp32",
                },
                {
                    **common(config),
                    "BIASED": biased,
                    "NEEDS_SCALE": not biased,
                    "GROUP": config.group,
                    "USE_TMA": config.tma,
                },
                config,
            )
    for config in tuning.candidates("add_product", arch, dtype, dim):
        yield Source(
            "add_product",
            add_product_kernel,
            {
                "left": operand,
                "left_row_stride": "i32",
                "left_depth_stride": "i32",
                "right": operand,
                "right_stride": "i32",
                "total": "*fp32",
                "total_stride": "i32",
                "num_rows": "i32",
                "dim": "i32",
                "depth": "i32",
            },
            {key: value for key, value in common(config).items() if key != "EVEN_K"} | {"GROUP": config.group},
            config,
        )


def whole_row_kernels(
    arch: str, dtype: torch.dtype = torch.bfloat16, dims: tuple[int, ...] = (64, 128, 256)
) -> Iterator[Source]:
    """Every configuration of the kernel that keeps rows of the gradient in registers."""
    operand, centroid = _TYPES[dtype], _TYPES[torch.float32 if dtype == torch.float32 else torch.float16]
    for dim in dims:
        for config in tuning.candidates("gradient_rows", arch, dtype, dim):
            yield Source(
                f"gradient_rows, D = {dim}",
                gradient_rows_kernel,
                {
                    "operands": operand,
                    "factors": "*fp32",
                    "factor_stride": "i32",
                    "logs": "*fp32",
                    "shares": "*fp32",
                    "log_stride": "i32",
                    "ranges": "*fp32",
                    "scale_pointer": "*fp32",
                    "log_reference": "*fp32",
                    "centroids": centroid,
                    "biases": "*fp32",
                    "centroid_scale": "*fp32",
                    "centroid_reference": "*fp32",
                    "products": "*fp32",
                    "centroid_products": "*fp32",
                    "scale_partials": "*fp64",
                    "num_rows": "i32",
                    "stacked_rows": "i32",
                    "num_splits": "i32",
                    "first_row": "i32",
                    "stop_row": "i32",
                    "dim": "i32",
                    "unit": "fp32",
                },
                {
                    "NUM_TARGETS": 2,
                    "PARTNERS": (tuple(Partner(0, 0, 1, 1, 0)), tuple(Partner(1, 1, 0, 0, 1))),
                    "CENTROIDS": True,
                    "NEEDS_SCALE": True,
                    "TILE_M": config.tile_m,
                    "TILE_N": config.tile_n,
                    "BLOCK_D": row_length(dim),
                    "EVEN_D": dim == row_length(dim),
                    "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
                    "USE_TMA": config.tma,
                },
                config,
            )


def row_kernels(dtype: torch.dtype = torch.bfloat16, dim: int = 512) -> Iterator[Source]:
    """The kernels that pass over rows, for two modalities."""
    z, centroid = _TYPES[dtype], _TYPES[torch.float32 if dtype == torch.float32 else torch.float16]
    block = {"BLOCK_N": max(1, 2048 // dim), "BLOCK_D": dim}
    rows = {"embeddings": (z, z), "strides": ("i32", "i32")}
    normalize = {"NORMALIZE": True, "NORMALIZE_CENTROIDS": True}
    yield Source(
        "operands",
        operands_kernel,
        {
            **rows,
            "operands": z,
            "factors": "*fp32",
            "factor_stride": "i32",
            "num_rows": "i32",
            "dim": "i32",
            "padded_dim": "i32",
        },
        {"NORMALIZE": True, **block},
    )
    yield Source(
        "row_statistics",
        row_statistics_kernel,
        {**rows, "cosines": "*fp32", "sums": "*fp64", "num_rows": "i32", "dim": "i32"},
        {
            "ALL_PAIRS": ((0, 1),),
            "NCE_PAIRS": ((1, 0),),
            "ATP_PAIRS": ((1, 0),),
            "CENTROIDS": True,
            **normalize,
            **block,
        },
    )
    yield Source(
        "centroids",
        centroids_kernel,
        {
            **rows,
            "sums": "*fp64",
            "centroids": centroid,
            "biases": "*fp32",
            "scale": "*fp32",
            "num_rows": "i32",
            "total_rows": "i32",
            "dim": "i32",
            "padded_dim": "i32",
            "uniformity_t": "fp32",
        },
        {**normalize, **block},
    )
    yield Source(
        "row_terms",
        row_terms_kernel,
        {
            **dict.fromkeys(
                (
                    "row_logs",
                    "col_logs",
                    "centroid_logs",
                    "row_log_sum",
                    "col_log_sum",
                    "wrong_share",
                    "own_centroid_logs",
                    "partials",
                ),
                "*fp64",
            ),
            "cosines": "*fp32",
            "logit_scale": "*fp32",
            "num_rows": "i32",
            "num_cols": "i32",
            "first_own": "i32",
        },
        {"NUM_PAIRS": 1, "CENTROIDS": True, "BLOCK": BLOCK},
    )
    yield Source(
        "combine",
        combine_kernel,
        {
            "partials": "*fp64",
            "sums": "*fp64",
            "loss": "*fp32",
            "terms": "*fp32",
            "log_total": "*fp64",
            "num_partials": "i32",
            "total_rows": "i32",
            "dim": "i32",
            "nce_weight": "fp32",
            "atp_weight": "fp32",
            "cu_weight": "fp32",
        },
        {
            "PAIRS": ((0, 1),),
            "NUM_MODALITIES": 2,
            "NUM_PAIRS": 1,
            "CENTROIDS": True,
            "BLOCK": 256,
            "BLOCK_D": dim,
        },
    )
    yield Source(
        "pair_weights",
        pair_weights_kernel,
        {
            "row_log_sum": "*fp64",
            "col_log_sum": "*fp64",
            "wrong_share": "*fp64",
            "cosines": "*fp32",
            "positive": "*fp32",
            "logit_scale": "*fp32",
            "centroid_logs": "*fp64",
            "logs": "*fp32",
            "shares": "*fp32",
            "log_stride": "i32",
            "ranges": "*fp32",
            "positive_moments": "*fp64",
            "log_reference": "*fp32",
            "centroid_reference": "*fp32",
            "num_rows": "i32",
            "num_cols": "i32",
            "unit": "fp32",
            "centroid_headroom": "fp32",
        },
        {"NUM_PAIRS": 1, "CENTROIDS": True, "SHARES": True, "BLOCK": WEIGHTS_BLOCK},
        tuning.Config(0, 0, 0, WEIGHTS_WARPS, 1),
    )
    yield Source(
        "scale_gradient",
        scale_gradient_kernel,
        {
            "partials": "*fp64",
            "positive_moments": "*fp64",
            "upstream": "*fp64",
            "logit_scale": "*fp32",
            "out": "*fp32",
            "num_partials": "i32",
            "num_rows": "i32",
        },
        {"NUM_PAIRS": 1, "BLOCK": 1024},
    )
    yield Source(
        "row_gradients",
        row_gradients_kernel,
        {
            **rows,
            "factors": "*fp32",
            "products": "*fp32",
            "num_splits": "i32",
            "num_centroid_splits": "i32",
            "centroid_products": "*bf16" if dtype == torch.bfloat16 else "*fp32",
            "wrong_share": "*fp64",
            "centroid_logs": "*fp64",
            "log_total": "*fp64",
            "reference": "*fp64",
            "sums": "*fp64",
            "upstream": "*fp64",
            "logit_scale": "*fp32",
            "out": z,
            "num_rows": "i32",
            "all_rows": "i32",
            "first_row": "i32",
            "total_rows": "i32",
            "dim": "i32",
            "padded_dim": "i32",
            "unit": "fp32",
            "uniformity_t": "fp32",
            "world_size": "fp32",
        },
        {
            "TARGET": 1,
            "POSITIVES": ((0, 0),),
            "ATP_PARTNERS": (0,),
            "NUM_PAIRS": 1,
            "NCE": True,
            "CENTROIDS": True,
            **normalize,
            **block,
        },
    )


def compile_for(source: Source, arch: str) -> Resources:
    """Compile one kernel for one architecture."""
    signature: dict[str, Any] = {}
    constants = dict(source.constants)
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    unaligned = {p.name for p in source.kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    for index, name in enumerate(source.kernel.arg_names):
        kind = source.types.get(name)
        if kind is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
            continue
        signature[name] = kind
        for place, element in enumerate(kind) if isinstance(kind, tuple) else [(None, kind)]:
            if name not in unaligned and (element[0] == "*" or element == "i32"):
                attributes[(index,) if place is None else (index, place)] = [["tt.divisibility", 16]]
    options: dict[str, Any] = {}
    if source.config is not None:
        options = {"num_warps": source.config.num_warps, "num_stages": source.config.num_stages}
    compiled = triton.compile(
        ASTSource(source.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=TARGETS[arch],
        options=options,
    )
    shared = compiled.metadata.shared
    if arch.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
        spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        return Resources(
            int(registers[1]) if registers else None, int(spilled[1]) if spilled else None, shared, assembly
        )
    registers_used, spilled_bytes = _resource_usage(compiled.asm["cubin"])
    return Resources(registers_used, spilled_bytes, shared, compiled.asm["ptx"])


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of the largest function in a binary."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers = max(map(int, re.findall(r"REG:(\d+)", text)))
    memory = max(int(stack) + int(local) for stack, local in re.findall(r"STACK:(\d+).*?LOCAL:(\d+)", text))
    return registers, memory


def main(archs: list[str]) -> None:
    """Print the table."""
    print("| arch | kernel | type | tile | warps | stages | variant | registers | spilled | shared KiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for arch in archs or list(TARGETS):
        for dtype in (torch.bfloat16, torch.float32):
            sources = [*matrix_kernels(arch, dtype), *whole_row_kernels(arch, dtype), *row_kernels(dtype)]
            for source in sources:
                c = source.config
                tile = (
                    ""
                    if c is None or not c.tile_m
                    else f"{c.tile_m}×{c.tile_n}×{c.tile_k} | {c.num_warps} | {c.num_stages}"
                )
                variant = "" if c is None else "tma" * c.tma
                kind = str(dtype).removeprefix("torch.")
                try:
                    r = compile_for(source, arch)
                    result = f"{r.registers} | {r.spilled} | {r.shared / 1024:.0f}"
                except Exception as error:
                    result = f"{type(error).__name__}: {str(error)[:200]!r} | |"
                print(f"| {arch} | {source.name} | {kind} | {tile or ' | | '} | {variant} | {result} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
