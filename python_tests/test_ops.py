"""Registration with torch.library: torch.compile, opcheck, gradcheck, second derivatives."""

import pytest
import torch
from oracle import DEVICE, random_embeddings

from gapkernels import GapLoss, gap_loss
from gapkernels.spec import LossSpec


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("spec", [LossSpec(), LossSpec(all_pairs=True, cu=False), LossSpec(nce=False)])
def test_opcheck(backend, spec, requires_grad):
    x, y, z = (e.requires_grad_(requires_grad) for e in random_embeddings(10, 4, 3))
    scale = torch.tensor(5.0, device=DEVICE, requires_grad=requires_grad)
    scalars = (scale, *(torch.tensor(v, dtype=torch.float64, device=DEVICE) for v in ([1.0, 0.5, 2.0], 2.0)))
    torch.library.opcheck(torch.ops.gapkernels.loss.default, ([x, y, z], *scalars, *spec, backend, "", 1))
    _, _, saved = torch.ops.gapkernels.loss([x, y, z], *scalars, *spec, backend, "", 1)
    saved = [s.detach() for s in saved]
    inputs = [e.detach() for e in (x, y, z)]
    upstream = torch.ones((), device=DEVICE)
    torch.library.opcheck(
        torch.ops.gapkernels.loss_backward.default,
        (
            upstream,
            None,
            inputs,
            *(scalar.detach() for scalar in scalars),
            saved,
            *spec,
            backend,
            "",
            [True, False, True, True],
        ),
    )


@pytest.mark.parametrize("modalities", [2, 3])
def test_gradcheck(modalities):
    inputs = [e.requires_grad_() for e in random_embeddings(6, 4, modalities, torch.float64)]
    scale = torch.tensor(3.0, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def terms(*arguments):
        *e, s = arguments
        return gap_loss(*e, logit_scale=s, pairs="all", return_terms=True, backend="torch")[:4]

    assert torch.autograd.gradcheck(terms, (*inputs, scale))


def test_compile_without_graph_break(backend):
    x, y = (e.requires_grad_() for e in random_embeddings(12, 6))
    scale = torch.tensor(9.0, device=DEVICE, requires_grad=True)

    def step(a, b, s):
        terms = gap_loss(a * 2, b, logit_scale=s, return_terms=True, backend=backend)
        return terms.loss + terms.align_true_pairs, terms.modality_gap

    compiled, gap = torch.compile(step, fullgraph=True)(x, y, scale)
    eager, eager_gap = step(x, y, scale)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gap, eager_gap)
    for a, b in zip(*(torch.autograd.grad(v, (x, y, scale)) for v in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_module_follows_a_weight_schedule(backend):
    x, y = random_embeddings(12, 6)
    module = GapLoss(learn_temperature=True, backend=backend).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True)
    for weight in (1.0, 0.5, 0.25, 0.0):
        module.cu_weight = weight
        torch.testing.assert_close(compiled(x, y), module(x, y))


def test_second_derivatives_are_refused_with_the_remedy(backend):
    x, y = (e.requires_grad_() for e in random_embeddings(8, 4))
    (gradient,) = torch.autograd.grad(gap_loss(x, y, backend=backend), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivative was asked for.*backend="reference"'):
        gradient.sum().backward()


def test_activation_checkpointing(backend):
    x, y = (e.requires_grad_() for e in random_embeddings(12, 6))
    checkpointed = torch.utils.checkpoint.checkpoint(
        lambda a, b: gap_loss(a, b, backend=backend), x, y, use_reentrant=False
    )
    expected = torch.autograd.grad(gap_loss(x, y, backend=backend), (x, y))
    for a, b in zip(torch.autograd.grad(checkpointed, (x, y)), expected, strict=True):
        torch.testing.assert_close(a, b)


def definition(x, y, temperature=0.07, atp_weight=1.0, cu_weight=1.0, uniformity_t=2.0):
    """The loss in float64, written out; numbers are those of this call."""
    scale = torch.tensor(1 / temperature, dtype=torch.float64)
    options = {"atp_weight": atp_weight, "cu_weight": cu_weight, "uniformity_t": uniformity_t}
    return gap_loss(x.double(), y.double(), logit_scale=scale, backend="reference", **options).item()


SCHEDULES = {
    "temperature": lambda step: {"temperature": 0.05 + 0.01 * step},
    "weights": lambda step: {"atp_weight": 1 + step / 100, "cu_weight": max(0.0, 1 - step / 60)},
    "uniformity_t": lambda step: {"uniformity_t": 1 + step / 50},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("training", [True, False])
def test_numbers_of_a_compiled_function_follow_any_schedule(schedule, training):
    """Python numbers that change at every call: the right value each time, from two graphs at most."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    x, y = (e.requires_grad_(training) for e in random_embeddings(16, 6))
    compiled = torch.compile(lambda a, b, options: gap_loss(a, b, **options), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        for step in range(0, 100, 1 if training else 7):
            options = SCHEDULES[schedule](step)
            value = compiled(x, y, options)
            if step % 9 == 0:
                assert value.item() == pytest.approx(definition(x.detach(), y.detach(), **options), rel=1e-5)
                if training:
                    assert torch.autograd.grad(value, x)[0].isfinite().all()
    assert counters["stats"]["unique_graphs"] <= 2


def test_an_inductor_graph_without_gradients_keeps_no_old_temperature():
    x, y = random_embeddings(16, 6)
    compiled = torch.compile(lambda a, b, p: gap_loss(a, b, temperature=0.05 + 0.1 * p))
    with torch.no_grad():
        for p in (0.1, 0.2, 0.4, 0.8, 1.0):
            assert compiled(x, y, p).item() == pytest.approx(definition(x, y, 0.05 + 0.1 * p), rel=1e-5)


def test_a_compiled_module_follows_its_attributes(backend):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    x, y = random_embeddings(16, 6)
    module = GapLoss(backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(30):
        module.atp_weight, module.cu_weight = 1 + step / 29, 1 - step / 29
        value = compiled(x, y).item()
        assert value == pytest.approx(definition(x, y, atp_weight=1 + step / 29, cu_weight=1 - step / 29), rel=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2


def test_weights_may_be_tensors_and_are_differentiable(backend):
    x, y = random_embeddings(20, 6)
    weights = [torch.tensor(w, device=DEVICE, requires_grad=True) for w in (0.3, 1.7, 0.6)]
    names = ("nce_weight", "atp_weight", "cu_weight")
    terms = gap_loss(x, y, backend=backend, return_terms=True, **dict(zip(names, weights, strict=True)))
    expected = sum(w.item() * term.item() for w, term in zip(weights, terms[1:4], strict=True))
    assert terms.loss.item() == pytest.approx(expected, rel=1e-5)
    for gradient, term in zip(torch.autograd.grad(terms.loss, weights), terms[1:4], strict=True):
        assert gradient.item() == pytest.approx(term.item(), rel=1e-5)


def test_a_temperature_is_inverted_in_float64(backend):
    """0.07 in bfloat16 is 0.06982421875; its inverse rounded to bfloat16 would be 14.3125 for 14.3217."""
    x, y = random_embeddings(20, 6)
    low = torch.tensor(0.07, dtype=torch.bfloat16, device=DEVICE)
    value = gap_loss(x, y, temperature=low, backend=backend).item()
    assert value == pytest.approx(definition(x, y, 0.06982421875), rel=1e-5)


@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "vmap", "grad"])
def test_transforms_are_refused_with_the_remedy(backend, transform):
    """A forward-mode derivative was silently zero."""
    x, y = random_embeddings(8, 4)

    def loss(a):
        return gap_loss(a, y, backend=backend)

    call = {
        "jvp": lambda: torch.func.jvp(loss, (x,), (x,)),
        "jacfwd": lambda: torch.func.jacfwd(loss)(x),
        "vmap": lambda: torch.func.vmap(loss)(x[None]),
        "grad": lambda: torch.func.grad(loss)(x),
    }[transform]
    with pytest.raises(RuntimeError, match=r'cannot be transformed by torch.func.*backend="reference"'):
        call()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r'no forward-mode derivative.*backend="reference"'),
    ):
        loss(torch.autograd.forward_ad.make_dual(x, x))


def test_a_tensor_that_outlives_a_transform_is_an_ordinary_one(backend):
    x, y = random_embeddings(8, 4)
    escaped = []
    torch.func.grad(lambda a: (escaped.append(a * 2), a.sum())[1])(x)
    assert torch._C._functorch.is_dead_tensor_wrapper(escaped[0])
    assert torch.equal(gap_loss(escaped[0], y, backend=backend), gap_loss(x * 2, y, backend=backend))


def test_the_definition_has_forward_mode_derivatives():
    x, y, v = (random_embeddings(8, 4, 3, torch.float64)[k] for k in range(3))
    _, tangent = torch.func.jvp(lambda a: gap_loss(a, y, backend="reference"), (x,), (v,))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gap_loss(leaf, y, backend="torch"), leaf)
    torch.testing.assert_close(tangent, (gradient * v).sum())
