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
