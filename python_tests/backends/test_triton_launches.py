"""What the Triton backend asks for: how many launches, and that another batch size compiles nothing."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from gapkernels.backends.triton.device import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels are interpreted in this process (TRITON_INTERPRET=1)", allow_module_level=True)

from backends.triton_launches import evaluate, recorded


def test_another_batch_size_compiles_nothing():
    """Even sizes, odd ones, one block of gradients or several: the same kernels."""
    keys = []
    for n in (4224, 4225, 8191, 12288):
        with recorded() as launches:
            evaluate(n)
        keys.append({launch.key for launch in launches})
    for other in keys[1:]:
        assert other ^ keys[0] == set()


def test_number_of_launches():
    """Small batches are bound by launches: 7 kernels forward; 9 and 3 library products backward."""
    with recorded() as launches:
        evaluate(4000)
    names = [launch.name for launch in launches]
    assert names.count("product") == 3
    assert len(names) == 7 + 9 + 3, names
    assert names.count("tile_sums_kernel") == 1  # the pair and the triangle


def test_gradients_nobody_needs_are_not_computed():
    with recorded() as launches:
        evaluate(4000, needs_grad=(True, False, False))
    names = [launch.name for launch in launches]
    assert names.count("product") == 2  # one of the centroids, one of the pair
    assert names.count("row_gradients_kernel") == 1
