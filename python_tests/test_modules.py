"""The modules: same values as the functions, a temperature that learns and stays within CLIP's bound."""

import math
import warnings

import pytest
import torch
from oracle import DEVICE, random_embeddings

import gapkernels
from gapkernels import (
    AlignTruePairsLoss,
    CentroidUniformityLoss,
    GapLoss,
    InfoNCELoss,
    align_true_pairs,
    centroid_uniformity,
    gap_loss,
    info_nce,
)


def test_modules_compute_what_the_functions_compute():
    e = random_embeddings(15, 6, 3)
    options = {"anchor": 2, "pairs": "all", "nce_weight": 0.5, "atp_weight": 2.0, "cu_weight": 0.3, "uniformity_t": 1.1}
    assert GapLoss(0.2, **options)(*e) == gap_loss(*e, temperature=0.2, **options)
    assert GapLoss(0.2, **options)(*e, return_terms=True) == gap_loss(*e, temperature=0.2, return_terms=True, **options)
    assert InfoNCELoss(0.2, anchor=1)(*e) == info_nce(*e, temperature=0.2, anchor=1)
    assert AlignTruePairsLoss(anchor=1)(*e) == align_true_pairs(*e, anchor=1)
    assert CentroidUniformityLoss(uniformity_t=0.7)(*e) == centroid_uniformity(*e, uniformity_t=0.7)


def test_a_fixed_temperature_has_no_parameters():
    assert not list(GapLoss().parameters())
    assert GapLoss().state_dict() == {}


def test_a_learned_temperature_learns_and_is_saved():
    x, y = random_embeddings(40, 8, noise=0.1)
    loss = GapLoss(temperature=0.5, learn_temperature=True).to(DEVICE)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
    scale = loss.temperature().item()
    assert scale > 2.5  # nearly right pairs ask for a sharper soft-max
    copy = GapLoss(learn_temperature=True).to(DEVICE)
    copy.load_state_dict(loss.state_dict())
    assert copy.temperature().item() == scale


def test_the_scale_is_clamped_at_100_and_can_come_back():
    x, y = random_embeddings(40, 8, noise=5.0)  # badly wrong pairs ask for a softer soft-max
    loss = InfoNCELoss(learn_temperature=True).to(DEVICE)
    with torch.no_grad():
        loss.temperature.log_scale.fill_(math.log(1000.0))
    value = loss(x, y)
    assert value.item() == pytest.approx(info_nce(x, y, logit_scale=100.0).item(), rel=1e-5)
    value.backward()
    assert loss.temperature.log_scale.grad > 0


def test_bad_temperature():
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got -1"):
        GapLoss(temperature=-1)


def test_docstring_examples():
    import doctest

    from gapkernels import backends, functional, modules
    from gapkernels.integrations import modgap, open_clip, sentence_transformers

    for module in (functional, modules, backends, modgap, open_clip, sentence_transformers):
        result = doctest.testmod(module, extraglobs={**vars(gapkernels), "torch": torch})
        assert result.attempted > 0
        assert result.failed == 0


def test_a_learned_temperature_is_not_changed_by_calls():
    """Neither by an evaluation beyond CLIP's bound, nor in place under a graph that was built before."""
    x, y = random_embeddings(20, 8)
    loss = InfoNCELoss(learn_temperature=True).to(DEVICE)
    with torch.no_grad():
        loss.temperature.log_scale.fill_(5.0)
    regulariser = loss.temperature.log_scale.square().sum()
    (loss(x, y) + regulariser).backward()
    assert loss.temperature.log_scale.item() == 5.0


@pytest.mark.parametrize("learn", [False, True])
def test_a_temperature_below_the_bound_is_what_was_asked_for(learn):
    x, y = random_embeddings(20, 8)
    loss = InfoNCELoss(0.005, learn_temperature=learn).to(DEVICE)
    assert loss(x, y).item() == pytest.approx(info_nce(x, y, temperature=0.005).item(), rel=1e-5)


@pytest.mark.parametrize("learn", [False, True])
def test_a_temperature_can_be_assigned(learn):
    x, y = random_embeddings(20, 8)
    loss = InfoNCELoss(learn_temperature=learn).to(DEVICE)
    loss.temperature = 0.2
    assert float(loss.temperature) == pytest.approx(0.2)
    assert loss(x, y).item() == pytest.approx(info_nce(x, y, temperature=0.2).item(), rel=1e-5)
    assert len(list(loss.parameters())) == learn
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got 0"):
        loss.temperature = 0


def test_a_learned_temperature_survives_construction_without_data():
    with torch.device("meta"):
        loss = GapLoss(0.1, learn_temperature=True)
    assert "learned=True" in repr(loss)
    loss = loss.to_empty(device="cpu")
    for module in loss.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert loss.temperature.log_scale.item() == pytest.approx(math.log(10))


def test_checkpoints_with_a_scalar_parameter_still_load():
    loss = GapLoss(learn_temperature=True)
    loss.load_state_dict({"temperature.log_scale": torch.tensor(1.5)})
    assert loss.temperature.log_scale.tolist() == [1.5]


@pytest.mark.parametrize("make", [GapLoss, CentroidUniformityLoss])
def test_a_last_batch_of_one_sample(make):
    """What is over pairs of samples is left out of it, with one warning; the other terms are those of the function."""
    loss = make()
    x, y = (e.requires_grad_() for e in random_embeddings(1, 5))
    with pytest.warns(UserWarning, match="one sample: the centroid uniformity") as caught:
        value = loss(x, y)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        terms = loss(x, y, return_terms=True)
    atp = align_true_pairs(x, y) if make is GapLoss else torch.zeros(())
    for of_loss in (value, terms.loss):
        torch.testing.assert_close(of_loss, atp)
        expected = torch.autograd.grad(align_true_pairs(x, y), x)[0] if make is GapLoss else torch.zeros_like(x)
        torch.testing.assert_close(torch.autograd.grad(of_loss, x, allow_unused=True)[0], expected)
    assert terms.centroid_uniformity == 0
    assert torch.isfinite(loss(*random_embeddings(2, 5)))
