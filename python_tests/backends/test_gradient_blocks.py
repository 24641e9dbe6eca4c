"""The side of a block of gradients, against its definition taken literally."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gapkernels.backends.triton import gradient_blocks

GRADIENT_TILE = (128, 128)


TABLE = [
    (width, processors, (128, 256 if width >= 512 and processors != 304 else 128))
    for processors in (108, 132, 148, 304)  # of an A100, an H100, a B200, an MI300X
    for width in (64, 512, 640, 768, 1024)
]


def literally(rows, cols, side, width, processors, tile):
    """Block by block; processors take tiles in turn, and a wave ends with its last tile."""
    total = 0.0
    for top in range(0, rows, side):
        for left in range(0, cols, side):
            height, length = min(side, rows - top), min(side, cols - left)
            products = [
                (i, k) for n in (height, length) for i in range(0, n, tile[0]) for k in range(0, width, tile[1])
            ]
            entries = [(i, j) for i in range(0, height, GRADIENT_TILE[0]) for j in range(0, length, GRADIENT_TILE[1])]
            for tiles, area, depth in (
                (products, tile[0] * tile[1], max(height, length)),
                (entries, GRADIENT_TILE[0] * GRADIENT_TILE[1], width),
            ):
                waves = [tiles[first : first + processors] for first in range(0, len(tiles), processors)]
                total += len(waves) * 2 * area * depth / 4096 / 1.755e9
            total += 2 * 4 * length * width / 3.35e12 + 2 * 3e-6
    return total


@pytest.mark.parametrize(("width", "processors", "tile"), TABLE)
def test_count_is_that_of_the_definition(width, processors, tile):
    for rows, cols, side in ((1, 1, 128), (300, 300, 256), (5000, 5000, 2816), (4096, 9000, 4096)):
        found = gradient_blocks.seconds(rows, cols, side, width, processors, tile, GRADIENT_TILE)
        assert found == pytest.approx(literally(rows, cols, side, width, processors, tile), rel=1e-12)


@pytest.mark.parametrize(("width", "processors", "tile"), TABLE)
def test_side_has_the_smallest_count_within_the_memory(width, processors, tile):
    for rows, cols in ((200, 200), (4096, 4096), (3000, 12000)):
        side = gradient_blocks.side(rows, cols, width, processors, tile, GRADIENT_TILE, 2)
        assert 2 * side**2 <= 32 * 2**20
        # Not all of them, which takes a minute.
        sides = {*range(1024, 4097, 512), *(s for s in (side - 128, side, side + 128) if 0 < s <= 4096)}
        counts = {s: literally(rows, cols, s, width, processors, tile) for s in sides}
        assert counts[side] <= min(counts.values()) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("width", "processors", "side", "tiles"),
    [
        (512, 132, 4096, 128),  # of 132
        (768, 132, 2816, 132),
        (640, 132, 2816, 132),
        (1024, 132, 4096, 256),  # of 264
        (512, 108, 3456, 108),
        (768, 148, 3072, 144),
    ],
)
def test_tiles_fill_the_processors(width, processors, side, tiles):
    n = 65536
    assert gradient_blocks.side(n, n, width, processors, (128, 256), GRADIENT_TILE, 2) == side
    assert 2 * (side // 128) * -(-width // 256) == tiles


def test_entries_of_four_bytes_take_no_more_memory():
    side = gradient_blocks.side(10**5, 10**5, 512, 132, (128, 128), GRADIENT_TILE, 4)
    assert 4 * side**2 <= 32 * 2**20


def test_chosen_side(monkeypatch):
    monkeypatch.setenv(gradient_blocks.VARIABLE, "1000")
    assert gradient_blocks.side(10**5, 10**5, 512, 132, (128, 256), GRADIENT_TILE, 2) == 1000
    assert gradient_blocks.largest_side(2) == 1000
    monkeypatch.setenv(gradient_blocks.VARIABLE, "0")
    with pytest.raises(ValueError, match="GAPKERNELS_GRADIENT_BLOCK must be a number of rows, 1 or more, got '0'"):
        gradient_blocks.largest_side(2)


@pytest.mark.parametrize(("dtype", "side"), [(torch.bfloat16, 2816), (torch.float32, 2816)], ids=str)
def test_backend_asks_for_the_device_at_hand(monkeypatch, dtype, side):
    from gapkernels.backends.triton import backend, device

    monkeypatch.setattr(device, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(device, "num_processors", lambda device: 132)
    like = torch.empty(1, 768, dtype=dtype)
    assert backend.TritonBackend().gradient_block(like, 2**20, 2**20) == side
