"""The authors' loss functions: values and gradients of their definitions, written out here in float64."""

import pytest
import torch
from oracle import DEVICE, random_embeddings

from gapkernels.integrations import modgap


def cross_entropy(logits):
    target = torch.arange(len(logits), device=logits.device)
    return (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2


DEFINITIONS = {
    "contrastive": (
        lambda x, y: modgap.contrastive_loss(x, y, temperature=0.2),
        lambda x, y: cross_entropy(x @ y.T / 0.2),
    ),
    "ClipLoss": (
        lambda x, y: modgap.ClipLoss(temperature=0.2)(5 * x, y),
        lambda x, y: cross_entropy(
            torch.nn.functional.normalize(5 * x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T / 0.2
        ),
    ),
    "lalign": (lambda x, y: modgap.lalign_loss(x, y), lambda x, y: (x - y).square().sum(dim=1).mean()),
    "lalign, alpha 1": (lambda x, y: modgap.lalign_loss(x, y, alpha=1), lambda x, y: (x - y).norm(dim=1).mean()),
    "lunif": (
        lambda x, y: modgap.lunif_loss(x + y, t=3),
        lambda x, y: torch.nn.functional.pdist(x + y).square().mul(-3).exp().mean().log(),
    ),
    "lunif of unit rows": (
        lambda x, y: modgap.lunif_loss(torch.nn.functional.normalize(x + y, dim=-1)),
        lambda x, y: (
            torch.nn.functional.pdist(torch.nn.functional.normalize(x + y, dim=-1)).square().mul(-2).exp().mean().log()
        ),
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_values_and_gradients(name):
    ours, definition = DEFINITIONS[name]
    embeddings = [torch.nn.functional.normalize(e, dim=1) for e in random_embeddings(33, 9, dtype=torch.float64)]
    results = []
    for function in (ours, definition):
        leaves = [e.clone().requires_grad_() for e in embeddings]
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_a_temperature_that_is_a_parameter_learns():
    temperature = torch.nn.Parameter(torch.tensor(0.2, device=DEVICE))
    loss = modgap.ClipLoss(temperature=temperature)
    assert list(loss.parameters()) == [temperature]
    loss(*random_embeddings(8, 4)).backward()
    assert temperature.grad.abs() > 0


def test_a_star_import_replaces_the_four_losses_and_nothing_else():
    namespace = {"get_beta": "the script's own", "lunif_loss": None}
    exec("from gapkernels.integrations.modgap import *", namespace)
    assert namespace["get_beta"] == "the script's own"
    assert namespace["lunif_loss"] is modgap.lunif_loss
    assert {name for name in namespace if not name.startswith("__")} == {*modgap.__all__, "get_beta"}
