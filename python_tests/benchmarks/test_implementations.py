"""Whoever claims to compute the same loss does."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import options, oracle
from benchmarks.cases import GAP, INFO_NCE, Case, option_of
from benchmarks.implementations import IMPLEMENTATIONS, LOGIT_SCALE, Unavailable
from benchmarks.workload import embeddings, step
from gapkernels import gap_loss, info_nce

CPU = torch.device("cpu")
# Tracing takes seconds for every function and shape; what is compiled is tested uncompiled in all variants.
CASES = [
    Case(name, loss, samples=96, width=24, modalities=modalities)
    for name, implementation in IMPLEMENTATIONS.items()
    for loss in sorted(implementation.losses)
    for modalities in ((2,) if implementation.two_modalities or implementation.compiled else (2, 3))
    if implementation.exact and not (implementation.compiled and loss == INFO_NCE)
]


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("loss", [GAP, INFO_NCE])
def test_oracle_is_the_definition(loss: str, modalities: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_BLOCK", 20)
    case = Case("", loss, samples=50, width=12, modalities=modalities)
    value, gradients = oracle.loss_and_gradients(embeddings(case, CPU), LOGIT_SCALE, loss)
    exact = [z.detach().double().requires_grad_() for z in embeddings(case, CPU)]
    function = gap_loss if loss == GAP else info_nce
    expected = function(*exact, logit_scale=LOGIT_SCALE, backend="reference")
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    assert oracle.relative_error(gradients, [z.grad for z in exact]) < 1e-12


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_same_loss_and_gradients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled functions are traced in one piece and not compiled further, which takes half a minute."""
    trace = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", trace)
    try:
        function = IMPLEMENTATIONS[case.implementation].function(case, CPU)
    except Unavailable as reason:
        pytest.skip(str(reason))
    inputs = embeddings(case, CPU)
    if option_of(case.loss):
        exact_loss, exact_gradients = options.exact(inputs, LOGIT_SCALE, case)
    else:
        exact_loss, exact_gradients = oracle.loss_and_gradients(inputs, LOGIT_SCALE, case.loss)
    value = step(function, inputs, backward=True)
    assert value.item() == pytest.approx(exact_loss, rel=1e-5)
    assert oracle.relative_error([z.grad for z in inputs], exact_gradients) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_authors_formulation_takes_sixteen_bit_types(dtype: str) -> None:
    case = Case("authors", samples=64, width=16, dtype=dtype)
    inputs = embeddings(case, CPU)
    value = step(IMPLEMENTATIONS["authors"].function(case, CPU), inputs, backward=True)
    exact_loss, exact_gradients = oracle.loss_and_gradients(inputs, LOGIT_SCALE, case.loss)
    assert value.item() == pytest.approx(exact_loss, rel=2e-2)
    assert oracle.relative_error([z.grad for z in inputs], exact_gradients) < 5e-2


def test_forward_leaves_no_gradients() -> None:
    case = Case("authors", samples=8, width=4, backward=False)
    inputs = embeddings(case, CPU)
    assert not step(IMPLEMENTATIONS["authors"].function(case, CPU), inputs, case.backward).requires_grad
    assert all(z.grad is None for z in inputs)


def test_everybody_gets_the_same_random_rows() -> None:
    first, second = (embeddings(Case(name, samples=512), CPU) for name in ("authors", "matmul"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    cosine = torch.cosine_similarity(*first).mean()
    assert 0.4 < cosine < 0.6


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("inf-cl", INFO_NCE), "not installed: pip install inf-cl==|needs an NVIDIA GPU"),
        (Case("open-clip", GAP), "does not compute the gap loss"),
        (Case("pytorch-metric-learning", INFO_NCE, modalities=3), "takes two modalities, not 3"),
    ],
)
def test_unavailable_says_why(case: Case, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        IMPLEMENTATIONS[case.implementation].function(case, CPU)
