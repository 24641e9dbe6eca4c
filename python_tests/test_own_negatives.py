"""Products of rows with candidates of their own: the dense form, blocks, rows of no length, autograd's checks."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE

from gapkernels import own_negatives
from gapkernels.own_negatives import own_products


@pytest.fixture(autouse=True)
def on_the_device_at_hand():
    with DEVICE:
        yield


def _inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    both = [
        torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") for shape in ((7, 5), (7, 3, 5))
    ]
    return [x.to(DEVICE, dtype).requires_grad_() for x in both]


def _dense(rows, own, normalize):
    if normalize:
        rows, own = (F.normalize(x, dim=-1) for x in (rows, own))
    return torch.einsum("nd,nkd->nk", rows, own)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_give_the_dense_form(normalize, dtype, monkeypatch):
    monkeypatch.setattr(own_negatives, "_NUMBERS_AT_ONCE", 45)  # three rows at a time, one is left
    rows, own = _inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in (rows, own)]
    found, expected = own_products(rows, own, normalize), _dense(*exact, normalize)
    assert found.dtype == torch.float64
    weight = torch.linspace(-1, 2, 21, dtype=torch.float64).view(7, 3)
    gradients = torch.autograd.grad((weight * found).sum(), (rows, own))
    expected_gradients = torch.autograd.grad((weight * expected).sum(), exact)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype != torch.float64 else 1e-13, atol=1e-6)
    for x, y in zip(gradients, expected_gradients, strict=True):
        assert x.dtype == dtype
        assert (x.double() - y).norm() <= 2 * rounding * y.norm()


def test_rows_of_no_length():
    rows, own = [x.detach().clone() for x in _inputs()]
    rows[1], own[2, 0], own[4] = 0, 0, 0
    inputs = rows.requires_grad_(), own.requires_grad_()
    expected = torch.autograd.grad(_dense(*inputs, True).exp().sum(), inputs)
    gradients = torch.autograd.grad(own_products(*inputs, True).exp().sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_autograd_knows_it(normalize):
    rows, own = _inputs()
    torch.library.opcheck(torch.ops.gapkernels.own_products.default, (rows, own, normalize))
    assert torch.autograd.gradcheck(lambda *x: own_products(*x, normalize), (rows, own))
    (only,) = torch.autograd.grad(own_products(rows.detach(), own, normalize).sum(), own)
    torch.testing.assert_close(only, torch.autograd.grad(_dense(rows, own, normalize).sum(), own)[0])
    (of_rows,) = torch.autograd.grad(own_products(rows, own, normalize).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(of_rows.sum(), rows)
