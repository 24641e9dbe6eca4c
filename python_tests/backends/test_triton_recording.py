"""Recorded launches as binaries get them, addresses in place of tensors; the interpreter tests what they compute."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gapkernels.backends.triton import recording
from gapkernels.backends.triton.launch import descriptor


class Kernel:
    """In place of one under ``triton.jit``; its binaries note what they get."""

    def __init__(self):
        self.got = []

    def __getitem__(self, grid):
        return lambda *args, **constants: SimpleNamespace(
            function="function", packed_metadata="metadata", run=lambda *args: self.got.append(args)
        )


def test_arguments_of_repeated_launches():
    kernel = Kernel()
    x, y = torch.ones(8, 4), torch.ones(8, 4)
    with recording.recorded() as recorder:
        kept = x.new_empty(8, 4)
        scratch = x.new_empty(300)
        later = x.new_empty(300)
        out = x.new_empty(3)
        args = ((x, y[2:]), kept[1:], scratch, out, 0.5, None, 7)
        recorder.launch(kernel, (5,), args, ("constant", 3), {})
        recorder.launch(kernel, (2, 6), (later, descriptor(kept, [4, 4]), float("inf")), (), {})
    # Part of an input is none: only the inputs themselves are known at another call.
    refused = recording.Recording(recorder, (x, y), (), (out,), (kept,))
    assert refused.refused
    recorder.launches[0] = recorder.launches[0]._replace(args=((x, y), *args[1:]))
    found = recording.Recording(recorder, (x, y), (), (out,), (kept,))
    assert not found.refused
    assert found.kept_bytes == 512
    assert found.scratch_bytes == 1536  # the two lie in one place: the one is used before the other
    found.run((1000, 2000, 3000, 10000, 20000), 42)
    first, second = kernel.got
    known = "function", "metadata", None, None, None
    assert first == (5, 1, 1, 42, *known, (1000, 2000), 10016, 20000, 3000, 0.5, None, 7, "constant", 3)
    assert second[:10] == (2, 6, 1, 42, *known, 20000)
    assert second[10].base.data_ptr() == 10000
    assert (second[10].shape, second[10].block_shape, second[11]) == (kept.shape, [4, 4], float("inf"))


def test_what_torch_computes_is_not_repeated():
    x = torch.ones(4)
    with recording.recorded() as recorder:
        out = x.new_empty(4)
        out.copy_(x)
    assert "copy_" in recording.Recording(recorder, (x,), (), (out,), ()).refused
    assert recording.active() is None
