"""When align true pairs merges the names of two classes, as the notes on the reproduction derive it.

Two names and two kinds of images; `rho` is the correlation of kind and class. With nothing between the loss and the
unit vectors, the merged state (one direction for everything) is stable up to a threshold in `rho`.
"""

import pytest
import torch

from gapkernels import gap_loss

_SCALE = 10.0


def _cosine_of_names(wrong_in_16: int, atp: float, cu: float = 0.0) -> float:
    """Descend from nearly merged vectors, with `wrong_in_16` of each 16 images of a kind in the other class."""
    kinds = torch.arange(2).repeat_interleave(16)
    classes = torch.where(torch.arange(16).repeat(2) < wrong_in_16, 1 - kinds, kinds)
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    vectors = start + 1e-2 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    vectors.requires_grad_()
    optimizer = torch.optim.LBFGS([vectors], max_iter=500, tolerance_grad=1e-11, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        images, names = vectors[:2][kinds], vectors[2:][classes]
        loss = gap_loss(images, names, logit_scale=_SCALE, atp_weight=atp, cu_weight=cu, backend="reference")
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
