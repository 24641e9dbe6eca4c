"""The sums of one similarity matrix by themselves: masks, signed weights, autograd's checks."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, skip_unsupported

from gapkernels import similarity_logsumexp, similarity_softplus


@pytest.fixture(autouse=True)
def on_the_device_at_hand(request):
    if "backend" in request.fixturenames:
        skip_unsupported(request.getfixturevalue("backend"), torch.float64)
    with DEVICE:
        yield


def _inputs(rows=11, cols=7, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    both = [torch.randn(n, dim, generator=generator, dtype=dtype, device="cpu") for n in (rows, cols)]
    return [x.to(DEVICE).requires_grad_() for x in both]


def _dense(rows, cols, scale, left_out):
    return (scale * F.normalize(rows, dim=1) @ F.normalize(cols, dim=1).T).masked_fill(left_out, -math.inf)


@pytest.mark.parametrize("scale", [2.0, 60.0, 400.0])
def test_signed_weights_of_every_sum(backend, scale):
    rows, cols = _inputs()
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    weight = [torch.linspace(-1, 2, n, dtype=torch.float64) for n in (11, 7)]
    sums = similarity_logsumexp(rows, cols, logit_scale=scale, matched=False, backend=backend)
    loss = sums.rows @ weight[0] + sums.cols @ weight[1]
    dense = _dense(rows, cols, scale, torch.zeros(11, 7, dtype=torch.bool))
    expected = dense.logsumexp(1) @ weight[0] + dense.logsumexp(0) @ weight[1]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    inputs = rows, cols, scale
    for one, other in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [2.0, 400.0])
def test_rows_and_columns_without_any_entry(backend, scale):
    rows, cols = _inputs()
    row_ids, col_ids = torch.zeros(11, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    row_ids[3:] = 1
    sums = similarity_logsumexp(
        rows, cols, logit_scale=scale, matched=False, row_ids=row_ids, col_ids=col_ids, backend=backend
    )
    assert sums.rows.isneginf().tolist() == [True] * 3 + [False] * 8
    total = sums.rows[3:].sum() + sums.cols.sum()
    dense = _dense(rows, cols, scale, row_ids[:, None] == col_ids)
    expected = dense[3:].logsumexp(1).sum() + dense.logsumexp(0).sum()
    torch.testing.assert_close(total, expected)
    for one, other in zip(
        torch.autograd.grad(total, (rows, cols)), torch.autograd.grad(expected, (rows, cols)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scale", [2.0, 400.0])
def test_limits_of_rows_and_of_columns_apart(backend, scale):
    rows, cols = _inputs()
    row_limit, col_limit = torch.linspace(-1, 1, 11) * scale, torch.linspace(1, -1, 7) * scale
    sums = similarity_logsumexp(
        rows, cols, logit_scale=scale, matched=False, row_limit=row_limit, col_limit=col_limit, backend=backend
    )
    dense = _dense(rows, cols, scale, torch.zeros(11, 7, dtype=torch.bool))
    by_row = dense.masked_fill(dense > row_limit[:, None], -math.inf).logsumexp(1)
    by_col = dense.masked_fill(dense > col_limit[None], -math.inf).logsumexp(0)
    torch.testing.assert_close(sums.rows, by_row)
    torch.testing.assert_close(sums.cols, by_col)
    some = [s.isfinite() for s in (by_row, by_col)]
    assert all(0 < s.sum() < len(s) for s in some)
    one = torch.autograd.grad(sums.rows[some[0]].sum() - sums.cols[some[1]].sum(), (rows, cols))
    # The dense form's own gradient is not a number where a whole row is left out.
    finite = dense.masked_fill(dense > row_limit[:, None], -1e300), dense.masked_fill(dense > col_limit[None], -1e300)
    total = finite[0].logsumexp(1)[some[0]].sum() - finite[1].logsumexp(0)[some[1]].sum()
    for gradient, expected in zip(one, torch.autograd.grad(total, (rows, cols)), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("bias", [-30.0, -2.0, 5.0, 200.0])
def test_softplus(backend, bias):
    rows, cols = _inputs()
    bias = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(-1, 2, 11, dtype=torch.float64)
    sums, positives = similarity_softplus(rows, cols, logit_scale=9.0, logit_bias=bias, matched=False, backend=backend)
    assert positives.shape == (0,)
    dense = -F.logsigmoid(-(_dense(rows, cols, 9.0, torch.zeros(11, 7, dtype=torch.bool)) + bias)).sum(dim=1)
    torch.testing.assert_close(sums, dense, rtol=1e-12, atol=0)
    inputs = rows, cols, bias
    for one, other in zip(
        torch.autograd.grad(sums @ weight, inputs), torch.autograd.grad(dense @ weight, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-30)


def test_what_is_not_a_number_passes_through(backend):
    rows, cols = _inputs(6, 6, dtype=torch.float32)
    with torch.no_grad():
        rows[2, 0] = math.nan
    sums = similarity_logsumexp(rows, cols, row_limit=torch.ones(6), backend=backend)
    assert sums.rows.isnan().tolist() == [False, False, True, False, False, False]
    assert sums.cols[[0, 1, 3, 4, 5]].isnan().all()


def test_gradcheck():
    rows, cols = _inputs(5, 5)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 0, 1, 2, 3])
    options = {"row_ids": ids, "col_ids": ids, "backend": "torch"}
    assert torch.autograd.gradcheck(
        lambda r, c, s: similarity_logsumexp(r, c, logit_scale=s, **options), (rows, cols, scale)
    )
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda r, c, s, b: similarity_softplus(r, c, logit_scale=s, logit_bias=b, **options), (rows, cols, scale, bias)
    )


def test_operators_are_registered_as_autograd_and_compilers_want_them():
    rows, cols = _inputs(5, 5)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -1.0))
    how = True, True, "torch", ""
    ops = torch.ops.gapkernels
    torch.library.opcheck(ops.similarity_logsumexp.default, (rows, cols, scale, None, None, None, None, *how, 1))
    torch.library.opcheck(ops.similarity_softplus.default, (rows, cols, scale, bias, None, None, *how))
    place, size = torch.tensor([0, 1, 0, 3, 1]), torch.tensor([2, 2, 2, 1, 2], dtype=torch.float64)
    torch.library.opcheck(ops.mean_of_equal_ids.default, (rows, place, size, ""))
    assert torch.autograd.gradcheck(lambda x: ops.mean_of_equal_ids(x, place, size, ""), (rows,))


def test_a_second_derivative_is_refused():
    rows, cols = _inputs(5, 5)
    sums = similarity_logsumexp(rows, cols, backend="torch")
    (gradient,) = torch.autograd.grad(sums.rows.sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cols": torch.ones(7, 5)}, ValueError, r"one shape, as they match, got \[11, 5\] and \[7, 5\]"),
        ({"cols": torch.ones(7, 4), "matched": False}, ValueError, "one D"),
        ({"cols": torch.ones(11, 5).half()}, TypeError, "one dtype, got float32 and float16"),
        ({"row_ids": torch.zeros(11).long()}, ValueError, "`row_ids` and `col_ids` together"),
        ({"row_limit": torch.zeros(10)}, ValueError, r"`row_limit` must be floating of shape \[11\]"),
        ({"backend": "fast"}, ValueError, "`backend` must be"),
    ],
)
def test_bad_input_is_named(options, error, message):
    arguments = {"rows": torch.ones(11, 5), "cols": torch.ones(11, 5), **options}
    with pytest.raises(error, match=message):
        similarity_logsumexp(**arguments)
