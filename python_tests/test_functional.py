"""The public functions: agreement with one another, types, autocast, and what bad input is told."""

import re

import pytest
import torch
from oracle import DEVICE, random_embeddings, skip_unsupported

import gapkernels
from gapkernels import align_true_pairs, centroid_uniformity, gap_loss, info_nce


def test_single_terms_are_the_parts_of_the_whole(backend):
    e = random_embeddings(20, 6, 3)
    options = {"logit_scale": 8.0, "anchor": 1, "backend": backend}
    terms = gap_loss(*e, **options, pairs="all", uniformity_t=1.3, normalize_centroids=False, return_terms=True)
    assert info_nce(*e, **options, pairs="all") == terms.info_nce
    assert align_true_pairs(*e, anchor=1, backend=backend) == terms.align_true_pairs
    uniformity = centroid_uniformity(*e, uniformity_t=1.3, normalize_centroids=False, backend=backend)
    assert uniformity == terms.centroid_uniformity
    torch.testing.assert_close(terms.loss, terms.info_nce + terms.align_true_pairs + terms.centroid_uniformity)


def test_temperature_is_the_inverse_of_the_scale_and_defaults_to_clips(backend):
    x, y = random_embeddings(20, 6)
    by_scale = gap_loss(x, y, logit_scale=20.0, backend=backend)
    assert gap_loss(x, y, temperature=0.05, backend=backend) == by_scale
    assert gap_loss(x, y, temperature=torch.tensor([0.05]), backend=backend).item() == pytest.approx(by_scale.item())
    assert gap_loss(x, y, backend=backend) == gap_loss(x, y, temperature=0.07, backend=backend)


def test_gradient_reaches_a_learned_temperature_of_any_shape(backend):
    x, y = random_embeddings(20, 6)
    temperature = torch.full((1,), 0.05, device=DEVICE, requires_grad=True)
    gap_loss(x, y, temperature=temperature, backend=backend).backward()
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    gap_loss(x, y, logit_scale=scale, backend=backend).backward()
    assert temperature.grad.shape == (1,)
    assert temperature.grad.item() == pytest.approx(-scale.grad.item() * 400, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_type_of_the_loss(backend, dtype):
    skip_unsupported(backend, dtype)
    x, y = random_embeddings(8, 4, dtype=dtype)
    terms = gap_loss(x, y, backend=backend, return_terms=True)
    assert {t.dtype for t in terms} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert all(t.shape == () for t in terms)


def test_autocast_takes_the_wider_type_of_two_towers(backend):
    x, y = random_embeddings(8, 4)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        image = x @ torch.eye(4, device=DEVICE)
        assert image.dtype == torch.bfloat16
        mixed = gap_loss(image, y, backend=backend)
    assert mixed == gap_loss(image.float(), y, backend=backend)


def embeddings(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([embeddings(4, 2)], {}, ValueError, "at least 2 embeddings (one per modality) are needed, got 1"),
        ([embeddings(4, 2), [1.0]], {}, TypeError, "embedding 1 must be a torch.Tensor, got list"),
        (
            [embeddings(4, 2), embeddings(4, 2, dtype=torch.int64)],
            {},
            TypeError,
            "embedding 1 must be float16, bfloat16, float32 or float64, got int64",
        ),
        ([embeddings(4), embeddings(4)], {}, ValueError, "embedding 0 must have shape [N, D] with N, D ≥ 1, got [4]"),
        ([embeddings(0, 2), embeddings(0, 2)], {}, ValueError, "got [0, 2]"),
        (
            [embeddings(4, 2), embeddings(5, 2)],
            {},
            ValueError,
            "embeddings must have one shape, got [4, 2] for embedding 0 and [5, 2] for embedding 1",
        ),
        (
            [embeddings(4, 2), embeddings(4, 2).to("meta")],
            {},
            ValueError,
            "embeddings must be on one device, got cpu for embedding 0 and meta for 1",
        ),
        (
            [embeddings(4, 2), embeddings(4, 2, dtype=torch.float64)],
            {},
            TypeError,
            "embeddings must have one dtype, got float32, float64",
        ),
        (
            [embeddings(1, 2), embeddings(1, 2)],
            {},
            ValueError,
            "the centroid uniformity needs at least 2 samples, got embeddings of shape [1, 2]",
        ),
        ([embeddings(4, 2)] * 3, {"anchor": 5}, ValueError, "`anchor` must be in [0, 2] for 3 embeddings, got 5"),
        ([embeddings(4, 2)] * 2, {"anchor": -1}, ValueError, "`anchor` must be in [0, 1] for 2 embeddings, got -1"),
        (
            [embeddings(4, 2)] * 2,
            {"keep_similarities": 2**20},
            TypeError,
            "`keep_similarities` must be True, False or None, got 1048576",
        ),
        ([embeddings(4, 2)] * 2, {"anchor": "text"}, TypeError, "`anchor` must be an integer, got str"),
        ([embeddings(4, 2)] * 2, {"pairs": "some"}, ValueError, "`pairs` must be 'anchor' or 'all', got 'some'"),
        (
            [embeddings(4, 2)] * 2,
            {"logit_scale": 1.0, "temperature": 1.0},
            ValueError,
            "give `logit_scale` or `temperature` (its inverse), not both",
        ),
        ([embeddings(4, 2)] * 2, {"temperature": 0}, ValueError, "`temperature` must be positive and finite, got 0"),
        (
            [embeddings(4, 2)] * 2,
            {"logit_scale": -3.0},
            ValueError,
            "`logit_scale` must be positive and finite, got -3.0",
        ),
        (
            [embeddings(4, 2)] * 2,
            {"temperature": torch.tensor(-1.0)},
            ValueError,
            "the logit scale (1/temperature) must be positive, got -1.0",
        ),
        (
            [embeddings(4, 2)] * 2,
            {"logit_scale": torch.ones(2)},
            ValueError,
            "`logit_scale` must be a number or a floating tensor of one element, got float32 of shape [2]",
        ),
        ([embeddings(4, 2)] * 2, {"temperature": "warm"}, TypeError, "`temperature` must be a number, got str"),
        ([embeddings(4, 2)] * 2, {"cu_weight": float("nan")}, ValueError, "`cu_weight` must be finite, got nan"),
        ([embeddings(4, 2)] * 2, {"uniformity_t": 0}, ValueError, "`uniformity_t` must be positive and finite, got 0"),
        (
            [embeddings(4, 2)] * 2,
            {"backend": "fast"},
            ValueError,
            "`backend` must be 'auto' or one of 'reference', 'torch'",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        gap_loss(*arguments, **options)


def test_public_names():
    assert {name for name in dir(gapkernels) if name in gapkernels.__all__} == set(gapkernels.__all__)
