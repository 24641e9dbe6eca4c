"""When align true pairs merges the names of two classes, as the notes on the reproduction derive it.

Two names and two kinds of images; `rho` is the correlation of kind and class. With nothing between the loss and the
unit vectors, the merged state (one direction for everything) is stable up to a threshold in `rho`.
"""

import pytest
import torch

from gapkernels import ContrastOptions, gap_loss, info_nce

_SCALE = 10.0


def _cosine_of_names(wrong_in_16: int, atp: float, cu: float = 0.0, mask_equal_names: bool = False) -> float:
    """Descend from nearly merged vectors, with `wrong_in_16` of each 16 images of a kind in the other class."""
    kinds = torch.arange(2).repeat_interleave(16)
    classes = torch.where(torch.arange(16).repeat(2) < wrong_in_16, 1 - kinds, kinds)
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    vectors = start + 1e-2 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    vectors.requires_grad_()
    options: ContrastOptions = {"ids": classes, "uniformity_of_equal_ids": False} if mask_equal_names else {}
    optimizer = torch.optim.LBFGS([vectors], max_iter=500, tolerance_grad=1e-11, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        images, names = vectors[:2][kinds], vectors[2:][classes]
        loss = gap_loss(images, names, logit_scale=_SCALE, atp_weight=atp, cu_weight=cu, backend="reference", **options)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    names = vectors[2:].detach()
    return torch.cosine_similarity(names[0], names[1], dim=0).item()


@pytest.mark.parametrize(
    ("wrong_in_16", "atp", "cu"),
    [
        (7, 1.0, 0.0),
        (6, 1.0, 0.0),
        (6, 2.0, 0.0),
        (5, 2.0, 0.0),
        (7, 0.25, 0.0),
        (7, 2.0, 0.5),
        (6, 2.0, 0.5),
        (7, 1, 1),
    ],
)
def test_names_merge_below_the_threshold(wrong_in_16: int, atp: float, cu: float) -> None:
    rho = 1 - 2 * wrong_in_16 / 16
    threshold = 2 * (atp - cu) / (_SCALE + 2 * atp + 2 * cu)
    assert (_cosine_of_names(wrong_in_16, atp, cu) > 1 - 1e-6) == (rho < threshold)


@pytest.mark.parametrize(
    ("wrong_in_16", "atp"), [(7, 0.25), (7, 1.0), (7, 2.0), (6, 2.0), (7, 4.0), (6, 4.0), (5, 4.0), (4, 8.0), (5, 8.0)]
)
def test_masked_equal_names_merge_at_a_lower_threshold(wrong_in_16: int, atp: float) -> None:
    rho = 1 - 2 * wrong_in_16 / 16
    # Each of the 32 samples has the 16 of the other class as negatives; with many the factor becomes 2.
    pull = 2 * _SCALE * 16 / 17
    assert (_cosine_of_names(wrong_in_16, atp, mask_equal_names=True) > 1 - 1e-6) == (rho < 2 * atp / (pull + 2 * atp))


def test_equal_names_as_positives_are_equal_names_as_negatives() -> None:
    # A name's copies are one vector: the mean cosine to them is the cosine to any, and every sum is the same.
    generator = torch.Generator().manual_seed(0)
    names, images = (torch.randn(n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in (5, 64))
    ids = torch.randint(5, (64,), generator=generator)
    every: list[ContrastOptions] = [{}, {"ids": ids, "duplicates": "positive"}, {"ids": ids, "duplicates": "mask"}]
    losses = [info_nce(names[ids], images, temperature=0.1, backend="reference", **options) for options in every]
    gradients = [torch.cat(torch.autograd.grad(loss, [names, images])) for loss in losses]
    assert torch.isclose(losses[1], losses[0], rtol=1e-12)
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    assert losses[2] < losses[0] - 0.01
