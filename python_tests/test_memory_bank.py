"""The memory bank: order, state, and use as negatives."""

import pytest
import torch

from gapkernels import MemoryBank, info_nce


def test_first_in_first_out_across_its_end():
    bank = MemoryBank(5, 1, with_ids=True)
    for start, count in ((0, 2), (2, 2), (4, 3), (7, 9)):
        values = torch.arange(start, start + count)
        bank.push(values[:, None].float(), ids=values)
        last = range(max(0, start + count - 5), start + count)
        assert sorted(bank.negatives()[:, 0].tolist()) == list(last)
        assert torch.equal(bank.ids(), bank.negatives()[:, 0].long())
    assert len(bank) == 5


def test_it_is_part_of_the_state():
    bank, other = MemoryBank(4, 2, with_ids=True), MemoryBank(4, 2, with_ids=True)
    bank.push(torch.randn(3, 2), ids=torch.arange(3))
    other.load_state_dict(bank.state_dict())
    for b in (bank, other):
        b.push(torch.ones(2, 2), ids=torch.tensor([7, 8]))
    assert torch.equal(bank.negatives(), other.negatives())
    assert torch.equal(bank.ids(), other.ids())


def test_what_is_pushed_after_the_loss_does_not_disturb_its_gradient():
    bank = MemoryBank(4, 3)
    bank.push(torch.randn(4, 3))
    query, positive = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    negatives = bank.negatives()
    (expected,) = torch.autograd.grad(info_nce(query, positive, negatives=negatives.clone()), query)
    loss = info_nce(query, positive, negatives=negatives)
    bank.push(positive)
    assert torch.equal(torch.autograd.grad(loss, query)[0], expected)
    assert not bank.negatives().requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemoryBank(0, 2), "`capacity` must be at least 1, got 0"),
        (lambda: MemoryBank(2, 2).push(torch.ones(1, 3)), r"must have shape \[n, 2\], got \[1, 3\]"),
        (lambda: MemoryBank(2, 2).push(torch.ones(1, 2), torch.ones(1)), "with_ids=True"),
        (lambda: MemoryBank(2, 2, with_ids=True).push(torch.ones(1, 2)), "with_ids=True, and to no other; got None"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
