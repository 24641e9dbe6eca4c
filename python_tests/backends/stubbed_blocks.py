"""Prints how many launches of blocks were compared, and what a block costs the host, written out and by the launchers.

Run by ``test_triton_launches.py`` in a process of its own. The blocks of a matrix are launched twice on the same
tensors, by the launchers and written out, and nothing runs.
"""

import os
import time
from functools import partial
from unittest.mock import patch

import torch

from benchmarks.host_time import _Kernel, stubbed
from gapkernels.backends.contract import NO_DIAGONAL, Matrix, PreparedSums, SigmoidWeights, SoftmaxSums
from gapkernels.backends.triton import block_launches, gradient_blocks
from gapkernels.backends.triton.backend import TritonBackend

ROWS, COLS, WIDTH = 700, 900, 768


def plain(arg):
    """An argument by its value: addresses of tensors, descriptors by all that they say."""
    if isinstance(arg, torch.Tensor):
        return arg.data_ptr()
    if hasattr(arg, "block_shape"):
        return arg.base.data_ptr(), list(arg.shape), list(arg.strides), list(arg.block_shape), arg.padding
    return arg


FOUND: list = []
"""Everything that is handed to compiled kernels."""


def record(self, *args):
    """In place of a compiled kernel's ``run``."""
    FOUND.append((self.name, id(self), *map(plain, args)))


def launches(run):
    """What a call launches."""
    FOUND.clear()
    run()
    return list(FOUND)


def cases(dtype):
    """Matrices and sums of every kind that has kernels of its own."""

    def vector(n, kind=torch.float32):
        return torch.zeros(n, dtype=kind)

    double, ids = torch.float64, torch.int64
    rows, cols = torch.zeros(ROWS, WIDTH, dtype=dtype), torch.zeros(COLS, WIDTH, dtype=dtype)
    pair = Matrix(rows, vector(ROWS), cols, vector(COLS), torch.tensor(14.3), diagonal=100)
    plain_sums = SoftmaxSums(vector(ROWS), vector(COLS), vector(ROWS, double))
    weighted = plain_sums._replace(row_weight=vector(ROWS, double), col_weight=vector(COLS, double))
    masked = pair._replace(row_ids=vector(ROWS, ids), col_ids=vector(COLS, ids), row_limit=vector(ROWS, double))
    bias = vector(1, double)[0]
    yield pair, plain_sums, True
    yield pair._replace(diagonal=NO_DIAGONAL), plain_sums, False
    yield pair._replace(entries=torch.zeros(ROWS, 1024)[:, :COLS]), plain_sums, True
    yield pair._replace(entries=torch.zeros(ROWS, 1024, dtype=torch.bfloat16)[:, :COLS]), plain_sums, False
    yield pair, weighted, True
    yield masked, weighted, False
    yield pair, SigmoidWeights(bias, vector(ROWS, double), vector(ROWS, double)), True
    yield pair._replace(col_factor=pair.row_factor, cols=rows, row_factor=pair.row_factor, biased=True, symmetric=True,
                        diagonal=0), None, False  # fmt: skip


def main():
    os.environ[gradient_blocks.VARIABLE] = "256"
    compared = 0
    buffers = {}
    new_empty = torch.Tensor.new_empty

    def one_buffer(self, size, **kwargs):  # H lies where it lay
        return buffers.setdefault((size, *kwargs), new_empty(self, size, **kwargs))

    with stubbed(), patch.object(torch.Tensor, "new_empty", one_buffer), patch.object(_Kernel, "run", record):
        backend = TritonBackend()
        for dtype in (torch.bfloat16, torch.float16):
            for matrix, sums, has_moment in cases(dtype):
                (n, _), count = matrix.rows.shape, matrix.cols.shape[0]
                zero = torch.zeros(())
                prepared = PreparedSums(zero, zero, zero, zero, None)
                totals = torch.zeros(n, WIDTH), None if matrix.symmetric else torch.zeros(count, WIDTH)
                for rows_wanted, cols_wanted in ((True, True), (True, False), (False, True)):
                    if matrix.symmetric and not (rows_wanted and cols_wanted):
                        continue
                    moment = backend.moment_buffer(matrix) if has_moment else None

                    wanted = (t if w else None for t, w in zip(totals, (rows_wanted, cols_wanted), strict=True))
                    run = partial(backend.add_products, matrix, sums, prepared, *wanted, moment, True, True)
                    for _ in range(2):  # kernels are made, then what the launchers launch is written out
                        run()
                    written = launches(run)
                    with patch.object(block_launches, "of_matrix", lambda *_: None):
                        launched = launches(run)
                    with patch.object(TritonBackend, "_add_block", side_effect=AssertionError("not written out")):
                        assert launches(run) == written
                    assert written == launched
                    compared += len(written)
        print(compared, *times())


def times():
    """Microseconds of the host per block, written out and by the launchers: the fastest of many calls."""
    n, width, side = 16384, 64, 1024
    backend, zero = TritonBackend(), torch.zeros(())
    rows, factors, log_sums = torch.zeros(n, width, dtype=torch.bfloat16), torch.zeros(n), torch.zeros(n)
    matrix = Matrix(rows, factors, rows.clone(), factors, torch.tensor(14.3))
    sums = SoftmaxSums(log_sums, log_sums, torch.zeros(n, dtype=torch.float64))
    totals = torch.zeros(n, width), torch.zeros(n, width)
    moment = backend.moment_buffer(matrix)

    def once():
        started = time.thread_time()
        backend.add_products(matrix, sums, PreparedSums(zero, zero, zero, zero, None), *totals, moment, True, True)
        return 1e6 * (time.thread_time() - started) / (n // side) ** 2

    os.environ[gradient_blocks.VARIABLE] = str(side)
    with patch.object(_Kernel, "run", lambda *_: None):
        written = min(once() for _ in range(20))
        with patch.object(block_launches, "of_matrix", lambda *_: None):
            return written, min(once() for _ in range(10))


if __name__ == "__main__":
    main()
