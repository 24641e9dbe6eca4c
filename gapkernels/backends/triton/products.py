"""Products of a gradient block with embeddings, added to float32.

    total_rows[R, D] += H[R, C] · cols[C, D]         total_cols[C, D] += Hᵀ[C, R] · rows[R, D]

``add_products`` takes both in one launch, so that the tiles of one fill the processors that the other leaves idle:

    program numbers   | tiles of total_rows: R/TILE_M × D/TILE_N | tiles of total_cols: C/TILE_M × D/TILE_N |
    one tile          steps of TILE_K along C or R, float32 accumulators, then stored, or added to what is there

4·R·C·D operations; H is read from the L2 cache if it was just written there, D/TILE_N times for each product. A tile
has one owner and a fixed order of additions: always the same bits.

True float32 products are the vendor's library's, which is far faster there. Of 16-bit operands torch multiplies into a
float32 accumulator as well, on NVIDIA GPUs (``torch.addmm(out_dtype=…)``, with a float32 addend since 2.10):
GAPKERNELS_PRODUCTS=library takes that instead of the kernel, to measure both; ``triton`` and ``cuda`` are for the CUDA
backend, which has a kernel of its own. In deterministic mode the library refuses to unless CUBLAS_WORKSPACE_CONFIG was
set when it started, so there it is the kernel in any case.

GAPKERNELS_EARLY_LAUNCH=1 lets the kernel be launched while the one that writes H ends (programmatic dependent launch,
from compute capability 9.0 on): it reads nothing before that has ended and what it wrote can be seen.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.device import INTERPRETED, architecture, cdiv, input_precision
from gapkernels.backends.triton.launch import descriptor, launch
from gapkernels.backends.triton.recording import Launch
from gapkernels.backends.triton.tiles import grouped_tile

VARIABLE = "GAPKERNELS_PRODUCTS"
CHOICES = ("library", "triton", "cuda")
EARLY_VARIABLE = "GAPKERNELS_EARLY_LAUNCH"


@triton.jit
def product_tile(
    left, left_stride, right, right_stride, total, total_stride, tile, num_rows, dim, depth, is_first,
    TRANSPOSED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """One tile of ``left @ right``, or of ``leftᵀ @ right`` if TRANSPOSED, stored or added."""
    row_tile, col_tile = grouped_tile(tile, tl.cdiv(num_rows, TILE_M), tl.cdiv(dim, TILE_N), GROUP)
    row_start, col_start = row_tile * TILE_M, col_tile * TILE_N
    acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    if USE_TMA:
        for start in range(0, depth, TILE_K):
            x = left.load([start, row_start]).T if TRANSPOSED else left.load([row_start, start])
            acc = tl.dot(x, right.load([start, col_start]), acc, input_precision=PRECISION)
    else:
        # No mask in the direction of contiguous numbers but one that a multiple of 16 bounds: masks and clamped places
        # there make the compiler load number by number. Rows of H have room for whole tiles.
        i, k = row_start + tl.arange(0, TILE_M), tl.arange(0, TILE_K)
        j = col_start + tl.arange(0, TILE_N)
        if TRANSPOSED:
            x_pointers, x_step = left + (k[:, None] * left_stride + i[None, :]), TILE_K * left_stride
        else:
            i = tl.minimum(i, num_rows - 1)
            x_pointers, x_step = left + (i[:, None] * left_stride + k[None, :]), TILE_K
        y_pointers = right + (k[:, None] * right_stride + j[None, :])
        j_exists = (j < dim)[None, :]
        whole = depth // TILE_K * TILE_K
        for _ in range(0, whole, TILE_K):
            x = tl.load(x_pointers)
            y = tl.load(y_pointers, mask=j_exists, other=0.0)
            acc = tl.dot(x.T if TRANSPOSED else x, y, acc, input_precision=PRECISION)
            x_pointers += x_step
            y_pointers += TILE_K * right_stride
        if whole < depth:
            inside = k < depth - whole
            x = tl.load(x_pointers, mask=inside[:, None] if TRANSPOSED else inside[None, :], other=0.0)
            y = tl.load(y_pointers, mask=inside[:, None] & j_exists, other=0.0)
            acc = tl.dot(x.T if TRANSPOSED else x, y, acc, input_precision=PRECISION)
    total += tl.cast(row_start, tl.int64) * total_stride + col_start
    add_tile(acc, total, total_stride, num_rows - row_start, dim - col_start, is_first, TILE_M, TILE_N)


@triton.jit
def add_tile(acc, total, total_stride, height, width, is_first, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """Add a tile to what is in memory, or put it there; wide ones in parts, which take the registers of a part only."""
    if TILE_N > 64:
        left, right = tl.split(tl.permute(tl.reshape(acc, (TILE_M, 2, TILE_N // 2)), (0, 2, 1)))
        add_tile(left, total, total_stride, height, width, is_first, TILE_M, TILE_N // 2)
        half: tl.constexpr = TILE_N // 2
        add_tile(right, total + half, total_stride, height, width - half, is_first, TILE_M, half)
    else:
        i, j = tl.arange(0, TILE_M), tl.arange(0, TILE_N)
        exists = (i < height)[:, None] & (j < width)[None, :]
        pointers = total + (i[:, None] * total_stride + j[None, :])
        # Where nothing has been added yet nothing is read: the buffer may hold anything.
        before = tl.load(pointers, mask=exists & (is_first == 0), other=0.0)
        tl.store(pointers, before + acc, mask=exists)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "rows_are_first", "cols_are_first"])
def both_products_kernel(
    h,
    h_transposed,
    h_stride,
    cols,
    col_stride,
    rows,
    row_stride,
    total_rows,
    total_row_stride,
    total_cols,
    total_col_stride,
    num_rows,
    num_cols,
    dim,
    rows_are_first,
    cols_are_first,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
    tile = tl.program_id(0)
    row_tiles = 0
    if total_rows is not None:
        row_tiles = tl.cdiv(num_rows, TILE_M) * tl.cdiv(dim, TILE_N)
        if tile < row_tiles:
            product_tile(
                h, h_stride, cols, col_stride, total_rows, total_row_stride, tile, num_rows, dim, num_cols,
                rows_are_first, False, TILE_M, TILE_N, TILE_K, GROUP, PRECISION, USE_TMA,
            )  # fmt: skip
    if total_cols is not None:  # noqa: SIM102 (by itself: what is absent is not compiled)
        if tile >= row_tiles:
            product_tile(
                h_transposed, h_stride, rows, row_stride, total_cols, total_col_stride, tile - row_tiles, num_cols,
                dim, num_rows, cols_are_first, True, TILE_M, TILE_N, TILE_K, GROUP, PRECISION, USE_TMA,
            )  # fmt: skip


def add_products(
    total_rows: Tensor | None,
    total_cols: Tensor | None,
    h: Tensor,
    cols: Tensor,
    rows: Tensor,
    first: bool,
    first_cols: bool,
) -> Launch | None:
    """``total_rows += h @ cols`` and ``total_cols += h.T @ rows``, in one launch; returns what ``.launch.launch`` does.

    Args:
        total_rows: ``[R, D']`` float32; None if not wanted.
        total_cols: ``[C, D']`` float32; None if not wanted.
        h: ``[R, C]`` in the operands' type, unit stride along its columns, a view of a buffer whose rows have room for
            whole tiles; what is there does not matter.
        cols, rows: ``[C, D']``, ``[R, D']``, unit stride along their rows.
        first: these are the first products that ``total_rows`` receives: it is overwritten and may hold anything.
        first_cols: likewise of ``total_cols``.
    """
    if by_library(h.dtype):
        if total_rows is not None:
            _library_product(total_rows, h, cols, first)
        if total_cols is not None:
            _library_product(total_cols, h.T, rows, first_cols)
        return None
    (num_rows, num_cols), dim = h.shape, cols.shape[1]
    early = starts_early(h.device)
    totals = tuple(total for total in (total_rows, total_cols) if total is not None)
    if not totals:
        return None

    def run(config: tuning.Config) -> Launch | None:
        m, n, k = config.tile_m, config.tile_n, config.tile_k
        use_tma = config.tma and copyable(h, cols, rows)
        assert use_tma or h.stride(0) >= cdiv(num_cols, m) * m, "rows of H must have room for whole tiles"
        tiles = sum(cdiv(total.shape[0], m) for total in totals) * cdiv(dim, n)
        return launch(
            both_products_kernel,
            (tiles,),
            (
                h.dtype,
                h.stride(0),
                dim,
                total_rows is None,
                total_cols is None,
                use_tma,
                early,
                config,
                input_precision(h.dtype),
            ),
            (
                descriptor(h, [m, k]) if use_tma else h,
                descriptor(h, [k, m]) if use_tma else h,
                h.stride(0),
                descriptor(cols, [k, n]) if use_tma else cols,
                cols.stride(0),
                descriptor(rows, [k, n]) if use_tma else rows,
                rows.stride(0),
                total_rows,
                0 if total_rows is None else total_rows.stride(0),
                total_cols,
                0 if total_cols is None else total_cols.stride(0),
                num_rows,
                num_cols,
                dim,
                int(first),
                int(first_cols),
            ),
            lambda: {
                "TILE_M": m,
                "TILE_N": n,
                "TILE_K": k,
                "GROUP": config.group,
                "PRECISION": input_precision(h.dtype),
                "USE_TMA": use_tma,
                "EARLY": early,
                **({"launch_pdl": True} if early else {}),
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
            },
        )

    return run(tuning.choose("both_products", cols, run, reset=totals))


def choice() -> str:
    """Whose products of 16-bit operands the environment asks for; empty where it does not.

    Raises:
        ValueError: it names a choice that there is not.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen not in ("", *CHOICES):
        raise ValueError(f"{VARIABLE} must be 'library', 'triton' or 'cuda', got {chosen!r}")
    return chosen


def by_library(dtype: torch.dtype) -> bool:
    """Whether products of operands of this type are the vendor's library's."""
    if INTERPRETED or torch.version.hip or torch.are_deterministic_algorithms_enabled():
        return False
    return dtype == torch.float32 or choice() == "library"


def starts_early(device: torch.device) -> bool:
    """Whether the kernel is launched while the one before it ends."""
    if os.environ.get(EARLY_VARIABLE) != "1":
        return False
    arch = architecture(device)
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


def _library_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    beta = 0 if first else 1  # with zero nothing is read
    if left.dtype == torch.float32:
        total.addmm_(left, right, beta=beta)
    else:
        torch.addmm(total, left, right, beta=beta, out_dtype=torch.float32, out=total)


def copyable(*operands: Tensor) -> bool:
    """Whether the copy engine can read them: aligned to 16 bytes, as is each row."""
    return all(x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 for x in operands)
