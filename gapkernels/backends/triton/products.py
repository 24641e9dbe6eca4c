"""Products of a gradient block with embeddings, added to float32: by the vendor's library, else by a kernel here.

    total[R, D] += H[R, C] · y[C, D]         total[C, D] += H[R, C]ᵀ · z[R, D]

torch multiplies 16-bit operands into a float32 accumulator on NVIDIA GPUs only (``torch.addmm(out_dtype=…)``, with a
float32 addend since 2.10), and in deterministic mode refuses to unless CUBLAS_WORKSPACE_CONFIG was set when it started.
There and elsewhere (AMD, Triton's interpreter) the kernel below does: a program per tile of ``total``, steps along C or
R. 2·R·C·D operations; reads R·C·b bytes of H, from the L2 cache if it was just written there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.device import INTERPRETED, cdiv, input_precision
from gapkernels.backends.triton.tiles import grouped_tile


@triton.jit(do_not_specialize=["num_rows", "depth"])
def add_product_kernel(
    left,
    left_row_stride,
    left_depth_stride,
    right,
    right_stride,
    total,
    total_stride,
    num_rows,
    dim,
    depth,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, col_tile = grouped_tile(tl.program_id(0), tl.cdiv(num_rows, TILE_M), tl.cdiv(dim, TILE_N), GROUP)
    i, j = row_tile * TILE_M + tl.arange(0, TILE_M), col_tile * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    left += tl.minimum(i, num_rows - 1)[:, None] * left_row_stride
    right += tl.minimum(j, dim - 1)[None, :]
    acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for start in tl.range(0, depth, TILE_K):
        inside = start + k < depth
        x = tl.load(left + (start + k)[None, :] * left_depth_stride, mask=inside[None, :], other=0.0)
        y = tl.load(right + (start + k)[:, None] * right_stride, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    pointers = total + i.to(tl.int64)[:, None] * total_stride + j[None, :]
    exists = (i < num_rows)[:, None] & (j < dim)[None, :]
    tl.store(pointers, tl.load(pointers, mask=exists, other=0.0) + acc, mask=exists)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` with ``total`` float32; ``left`` may be a transposed view."""
    if INTERPRETED or torch.version.hip or torch.are_deterministic_algorithms_enabled():
        _add_product_here(total, left, right)
    elif left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _add_product_here(total: Tensor, left: Tensor, right: Tensor) -> None:
    (num_rows, depth), dim = left.shape, right.shape[1]

    def launch(config: tuning.Config) -> None:
        grid = (cdiv(num_rows, config.tile_m) * cdiv(dim, config.tile_n),)
        add_product_kernel[grid](
            left,
            *left.stride(),
            right,
            right.stride(0),
            total,
            total.stride(0),
            num_rows,
            dim,
            depth,
            TILE_M=config.tile_m,
            TILE_N=config.tile_n,
            TILE_K=config.tile_k,
            GROUP=config.group,
            PRECISION=input_precision(left.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    launch(tuning.choose("add_product", right, launch, reset=total))
