"""The order of blocks: whichever products an accumulator receives first overwrite what its memory held."""

from collections.abc import Iterator

import pytest
import torch
from oracle import Tolerance, assert_matches_oracle, random_embeddings

from gapkernels import backends, gap_loss
from gapkernels.backends import cpu
from gapkernels.backends.contract import Backend
from gapkernels.backends.tiled import TiledBackend


@pytest.fixture(autouse=True)
def _memory_holds_no_numbers() -> Iterator[None]:
    """New memory is filled with NaN: reading it before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _create(name: str) -> Backend:
    if name == "cpu" and (reason := cpu.unusable_because()):
        pytest.skip(reason)
    return TiledBackend() if name == "torch" else cpu.create()


class InBlocks:
    """Makes a backend that forms its tiles inside one that is handed blocks."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self._monkeypatch, self._backend = name, monkeypatch, _create(name)
        monkeypatch.setattr(backends, "select", lambda *_: self._backend)

    def of(self, side: int | None) -> None:
        block = None if side is None else lambda *_: side
        self._monkeypatch.setattr(type(self._backend), "gradient_block", block)


@pytest.fixture(params=["torch", "cpu"])
def in_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> InBlocks:
    return InBlocks(request.param, monkeypatch)


OPTIONS = [{}, {"anchor": 2}, {"pairs": "all"}, {"cu_weight": 0.0, "pairs": "all"}, {"nce_weight": 0.0}]


@pytest.mark.parametrize("side", [None, 4, 5, 11, 12])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("modalities", [3, 4])
def test_blocks_in_any_order(in_blocks, side, options, modalities):
    in_blocks.of(side)
    # Centroids' products of bf16 embeddings are rounded to bf16 where there are several blocks.
    for dtype, tolerance in ((torch.float64, None), (torch.float32, None), (torch.bfloat16, Tolerance(1e-5, 6e-3))):
        embeddings = random_embeddings(12, 9, modalities, dtype)
        assert_matches_oracle(embeddings, 10.0, in_blocks.name, tolerance, **options)


@pytest.mark.parametrize("needs_grad", range(16))
@pytest.mark.parametrize("pairs", ["anchor", "all"])
def test_gradients_of_some(in_blocks, pairs, needs_grad):
    """Any choice of what is differentiated gives the gradients that all of it does."""
    in_blocks.of(5)
    embeddings, scale = random_embeddings(12, 9, 3, torch.float64), torch.tensor(10.0, dtype=torch.float64)
    everything = [x.clone().requires_grad_() for x in (*embeddings, scale)]
    gap_loss(*everything[:3], logit_scale=everything[3], pairs=pairs, backend=in_blocks.name).backward()
    some = [x.clone().requires_grad_(bool(needs_grad >> i & 1)) for i, x in enumerate((*embeddings, scale))]
    loss = gap_loss(*some[:3], logit_scale=some[3], pairs=pairs, backend=in_blocks.name)
    if needs_grad:
        loss.backward()
    for x, expected in zip(some, everything, strict=True):
        if x.requires_grad:
            torch.testing.assert_close(x.grad, expected.grad, rtol=1e-11, atol=1e-13)
        else:
            assert x.grad is None


@pytest.mark.parametrize("rows", [1, 63, 1000, 2049, 3200])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_tiles_of_a_block(name, rows):
    """Around the sides of the blocks that backends form inside."""
    _create(name)
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (e.requires_grad_() for e in random_embeddings(rows, 8, dtype=dtype))
        options = {"cu_weight": 1.0 if rows > 1 else 0.0, "backend": name}
        gap_loss(x, y, logit_scale=10.0, **options).backward()
        assert torch.isfinite(x.grad).all()
        assert torch.isfinite(y.grad).all()
