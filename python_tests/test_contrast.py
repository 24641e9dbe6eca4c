"""Contrasts with options: values and gradients against the float64 definition, on every backend."""

import math

import contrast_cases
import pytest
import torch
import torch.nn.functional as F
from contrast_cases import CASES
from oracle import DEVICE, TOLERANCE, random_embeddings, skip_unsupported, trained_embeddings

from gapkernels import GapLoss, InfoNCELoss, SigmoidLoss, gap_loss, info_nce, sigmoid_loss


def evaluate(case, embeddings, scale, backend, dtype, **options):
    """Loss, and its gradients with respect to embeddings, scale, and what else of the case requires one."""
    tensors = contrast_cases.tensors_of(case, embeddings[0])
    tensors = {name: t.to(dtype) if name == "negatives" else t for name, t in tensors.items()}
    tensors = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    leaves = [e.detach().to(dtype).requires_grad_() for e in embeddings]
    scale = torch.tensor(scale, dtype=torch.float64, device=DEVICE, requires_grad=True)
    terms = gap_loss(*leaves, logit_scale=scale, backend=backend, return_terms=True, **{**case, **tensors}, **options)
    inputs = [*leaves, scale, *(t for t in tensors.values() if t.requires_grad)]
    return terms, torch.autograd.grad(terms.loss, inputs)


def compare(case, embeddings, scale, backend, **options):
    dtype = embeddings[0].dtype
    tolerance = TOLERANCE[dtype]
    terms, gradients = evaluate(case, embeddings, scale, backend, dtype, **options)
    exact, exact_gradients = evaluate(case, embeddings, scale, "reference", torch.float64, **options)
    assert terms.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The sum of terms may cancel: each is compared at the size of the largest.
    size = max(1.0, *(abs(term.item()) for term in exact if term is not None))
    for term, value in zip(terms, exact, strict=True):
        assert (term is None) == (value is None)
        assert value is None or abs(term.item() - value.item()) <= tolerance.loss * size
    for gradient, value in zip(gradients, exact_gradients, strict=True):
        # A scalar's gradient is a sum that may cancel; it is right at the size of what is added up.
        floor = 1e-2 if value.dim() == 0 else 1e-30
        assert (gradient.double() - value).norm() <= tolerance.gradient * max(value.norm().item(), floor)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=contrast_cases.name_of)
def test_equals_the_definition(case, dtype, backend):
    skip_unsupported(backend, dtype)
    compare(case, random_embeddings(37, 20, dtype=dtype), 14.3, backend)


@pytest.mark.parametrize("options", [{"pairs": "all"}, {"anchor": 2, "normalize": False}], ids=str)
@pytest.mark.parametrize("case", CASES, ids=contrast_cases.name_of)
def test_three_modalities_equal_the_definition(case, options):
    scale = 5.0 if options.get("normalize", True) else 0.3
    compare(case, random_embeddings(23, 12, 3, torch.float64), scale, "torch", nce_weight=0.7, **options)


@pytest.mark.parametrize("rows", [2, 3, 127, 129])
@pytest.mark.parametrize("case", CASES[::3], ids=contrast_cases.name_of)
def test_sizes_around_tile_edges(case, rows, backend):
    compare(case, random_embeddings(rows, 33), 20.0, backend)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    "case", [CASES[3], CASES[9], CASES[13], CASES[15], CASES[19], CASES[26]], ids=contrast_cases.name_of
)
def test_scales(case, scale, backend):
    compare(case, trained_embeddings(64, 48), scale, backend)


def test_without_options_it_is_the_plain_loss():
    embeddings = random_embeddings(16, 8)
    defaults = {"ids": None, "directions": "both", "label_smoothing": 0.0, "duplicates": "mask", "contrast": "softmax"}
    assert torch.equal(gap_loss(*embeddings, **defaults), gap_loss(*embeddings))


def test_nt_xent_is_the_same_side_contrast():
    first, second = (F.normalize(e, dim=1) for e in random_embeddings(9, 6, dtype=torch.float64))
    views = torch.cat([first, second])
    logits = (views @ views.T / 0.2).fill_diagonal_(-math.inf)
    partner = torch.arange(18, device=DEVICE).roll(9)
    expected = F.cross_entropy(logits, partner)
    assert torch.isclose(info_nce(first, second, temperature=0.2, same_side=True), expected, rtol=1e-12)


def test_supervised_contrast_is_the_one_of_the_paper():
    query, document = (F.normalize(e, dim=1) for e in random_embeddings(8, 5, dtype=torch.float64))
    ids = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4], device=DEVICE)
    log_p = (query @ document.T / 0.1).log_softmax(dim=1)
    positives = ids[:, None] == ids
    expected = -((log_p * positives).sum(dim=1) / positives.sum(dim=1)).mean()
    loss = info_nce(query, document, temperature=0.1, ids=ids, duplicates="positive", directions="from_anchor")
    assert torch.isclose(loss, expected, rtol=1e-12)


def test_label_smoothing_is_torchs():
    query, document = (F.normalize(e, dim=1) for e in random_embeddings(8, 5, dtype=torch.float64))
    target = torch.arange(8, device=DEVICE)
    expected = F.cross_entropy(query @ document.T * 7, target, label_smoothing=0.2)
    loss = info_nce(query, document, logit_scale=7.0, label_smoothing=0.2, directions="from_anchor")
    assert torch.isclose(loss, expected, rtol=1e-12)


def test_samples_of_equal_ids_do_not_push_each_other():
    query, document = random_embeddings(6, 4, dtype=torch.float64)
    ids = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    query.requires_grad_()
    loss = info_nce(query, document, ids=ids)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(query.grad, torch.zeros_like(query))


def test_uniformity_is_zero_where_all_ids_are_equal():
    embeddings = [e.requires_grad_() for e in random_embeddings(6, 4)]
    ids = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    terms = gap_loss(*embeddings, ids=ids, uniformity_of_equal_ids=False, return_terms=True)
    terms.centroid_uniformity.backward()
    assert terms.centroid_uniformity.item() == 0
    assert not embeddings[0].grad.any()


@pytest.mark.parametrize("case", CASES[::2], ids=contrast_cases.name_of)
def test_losses_of_samples_average_to_the_loss(case, backend):
    embeddings = random_embeddings(12, 8)
    options = {**case, **contrast_cases.tensors_of(case, embeddings[0])}
    options.pop("uniformity_of_equal_ids", None)
    losses = info_nce(*embeddings, reduction="none", backend=backend, **options)
    assert losses.shape == (12,)
    assert torch.isclose(losses.mean(), info_nce(*embeddings, backend=backend, **options), rtol=1e-6)


def test_sums_are_those_of_the_loss_and_can_be_weighted(backend):
    query, document = (e.requires_grad_() for e in random_embeddings(12, 8))
    weight = torch.linspace(-1, 2, 12, dtype=torch.float64, device=DEVICE)

    def weighted(chosen, rows, cols):
        _, (sums,) = info_nce(rows, cols, logit_scale=9.0, backend=chosen, return_sums=True, same_side="anchor")
        total = (weight * (sums.rows - sums.positives)).sum() + (weight.flip(0) * sums.cols).sum()
        return total, torch.autograd.grad(total, (rows, cols))

    value, gradients = weighted(backend, query, document)
    exact, exact_gradients = weighted("reference", *(e.detach().double().requires_grad_() for e in (query, document)))
    assert torch.isclose(value, exact, rtol=1e-5)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("case", [CASES[4], CASES[15], CASES[24], CASES[27], CASES[18]], ids=contrast_cases.name_of)
def test_compiles_as_one_graph(case):
    embeddings = [e.requires_grad_() for e in random_embeddings(16, 8)]
    options = {**case, **contrast_cases.tensors_of(case, embeddings[0])}
    scale = torch.tensor(9.0, requires_grad=True)

    def call(scale, *inputs):
        return gap_loss(*inputs, logit_scale=scale, backend="torch", **options)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = scale, *embeddings
    for one, other in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(call(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_autocast_does_not_round():
    embeddings, negatives = random_embeddings(8, 16), torch.randn(4, 16, device=DEVICE)
    options = {"negatives": negatives, "label_smoothing": 0.1}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = info_nce(*embeddings, **options)
    assert torch.equal(inside, info_nce(*embeddings, **options))


def test_modules_take_options_and_candidates():
    query, document = random_embeddings(8, 4)
    ids = torch.arange(8, device=DEVICE) // 2
    assert torch.equal(
        InfoNCELoss(0.1, directions="from_anchor")(query, document, ids=ids),
        info_nce(query, document, temperature=0.1, directions="from_anchor", ids=ids),
    )
    module = SigmoidLoss(learn_bias=True, learn_temperature=True).to(DEVICE)
    loss = module(query, document)
    loss.backward()
    torch.testing.assert_close(loss, sigmoid_loss(query, document))
    assert module.logit_bias.grad is not None
    assert module.temperature.log_scale.grad is not None
    terms = GapLoss(contrast="sigmoid", logit_bias=-3.0)(query, document, return_terms=True)
    torch.testing.assert_close(
        terms.info_nce, sigmoid_loss(query, document, logit_scale=1 / 0.07, logit_bias=-3.0), rtol=1e-5, atol=0
    )


IDS = torch.arange(4)
NEGATIVES = torch.ones(3, 5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "both"}, TypeError, "unexpected keyword argument 'direction'"),
        ({"directions": "up"}, ValueError, "`directions` must be one of 'both', 'from_anchor', 'to_anchor'.*got 'up'"),
        ({"directions": (1.0, -1.0)}, ValueError, "must not be negative"),
        ({"same_side": "both"}, ValueError, "`same_side` must be one of False, True, 'anchor', 'other', got 'both'"),
        ({"label_smoothing": 1.0}, ValueError, r"must be in \[0, 1\), got 1.0"),
        ({"false_negative_margin": -0.1}, ValueError, "must not be negative, got -0.1"),
        ({"ids": IDS[:3]}, ValueError, r"`ids` must be int64 of shape \[4\], got int64 of shape \[3\]"),
        ({"ids": IDS.float()}, ValueError, r"`ids` must be int64 of shape \[4\], got float32 of shape \[4\]"),
        ({"ids": [0, 1, 2, 3]}, TypeError, "`ids` must be a torch.Tensor, got list"),
        ({"negatives": NEGATIVES[:, :4]}, ValueError, r"`negatives` must have shape \[K, 5\].*got \[3, 4\]"),
        ({"negatives": NEGATIVES.half()}, TypeError, "embeddings' dtype float32, got float16"),
        ({"negatives": NEGATIVES, "directions": "to_anchor"}, ValueError, "`negatives` and `directions`"),
        ({"negative_ids": IDS[:3], "negatives": NEGATIVES}, ValueError, "`negative_ids`=.* needs `ids`"),
        ({"duplicates": "positive"}, ValueError, "`duplicates`='positive' needs `ids`, got None"),
        ({"uniformity_of_equal_ids": False}, ValueError, "needs `ids`"),
        ({"ids": IDS, "label_smoothing": 0.1}, ValueError, "`label_smoothing` and `ids` contradict"),
        (
            {"contrast": "sigmoid", "decoupled": True},
            ValueError,
            "`decoupled`=True and `contrast`='sigmoid' contradict",
        ),
        ({"logit_bias": -3.0}, ValueError, "`logit_bias` needs contrast='sigmoid'"),
        ({"partition": "joint", "directions": (1, 2)}, ValueError, "`partition`='joint' and weights"),
        ({"same_side": "other", "directions": "from_anchor"}, ValueError, "`same_side`='other' and `directions`"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        gap_loss(torch.ones(4, 5), torch.ones(4, 5), **options)


def test_a_backend_that_lacks_an_option_names_one_that_has_it(monkeypatch):
    from gapkernels.backends.tiled import TiledBackend

    monkeypatch.setattr(TiledBackend, "sums_of", frozenset({"weights"}))
    with pytest.raises(ValueError, match="backend='torch' does not compute sums with ids"):
        info_nce(torch.ones(4, 5), torch.ones(4, 5), ids=IDS, backend="torch")
