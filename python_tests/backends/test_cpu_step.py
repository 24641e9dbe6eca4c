"""Whole evaluations in C++ and what is kept between the passes: the bits of the plan without either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gapkernels import gap_loss, ops
from gapkernels.backends import cpu
from gapkernels.backends.contract import Matrix, PreparedSums, Scalars, SoftmaxSums
from gapkernels.backends.cpu.backend import Step, Steps
from gapkernels.blocks import centroid_matrix
from gapkernels.spec import KEPT_SIMILARITY_BYTES, LossSpec

if (reason := cpu.unusable_because()) is not None:
    pytest.skip(reason, allow_module_level=True)

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIONS: dict[str, dict[str, Any]] = {
    "all terms": {},
    "all pairs": {"pairs": "all", "anchor": 1, "normalize_centroids": False},
    "alignment and uniformity": {"nce_weight": 0.0},
    "contrast": {"atp_weight": 0.0, "cu_weight": 0.0},
    "alignment": {"nce_weight": 0.0, "cu_weight": 0.0},
}


def embeddings(rows: int, width: int, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """Rows in a larger storage, of ordinary norms but for two of the first modality."""
    generator = torch.Generator().manual_seed(rows + width)
    z = [torch.randn(rows, width + 3, generator=generator, dtype=torch.float64) for _ in range(count)]
    z[0][0] = 0
    z[0][-1] *= 1e-20 if dtype in (torch.float32, torch.bfloat16) else 1e-3
    return [x.to(dtype)[:, 1 : 1 + width] for x in z]


def evaluate(z: list[Tensor], scale: float = 14.0, needs: tuple[bool, ...] = (), **options: Any) -> list[Tensor | None]:
    """Loss, terms, gradient of the scale and of the embeddings."""
    needs = needs or (True,) * (len(z) + 1)
    leaves = [x.detach().requires_grad_(needed) for x, needed in zip(z, needs, strict=False)]
    logit_scale = torch.tensor(scale, dtype=torch.float64, requires_grad=needs[-1])
    terms = gap_loss(*leaves, logit_scale=logit_scale, backend="cpu", return_terms=True, **options)
    terms.loss.backward()
    return [
        terms.loss.detach(),
        terms.modality_gap,
        terms.true_pair_cosine,
        *(None if x is None else x.detach() for x in (terms.info_nce, terms.align_true_pairs)),
        logit_scale.grad,
        *[x.grad for x in leaves],
    ]


def assert_same_bits(first: list[Tensor | None], second: list[Tensor | None]) -> None:
    assert [x is None for x in first] == [x is None for x in second]
    for x, y in zip(first, second, strict=True):
        if x is not None and y is not None:
            assert torch.equal(x, y)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluate by the plan."""

    def run(*arguments: Any, **options: Any) -> list[Tensor | None]:
        with monkeypatch.context() as patch:
            patch.setattr(Steps, "find", lambda *_: None)
            return evaluate(*arguments, **options)

    return run


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("rows", "width"), [(3, 7), (130, 64), (300, 100)])
def test_a_step_has_the_bits_of_the_plan(planned, rows, width, options, dtype) -> None:
    z = embeddings(rows, width, dtype)
    assert_same_bits(evaluate(z, **options), planned(z, **options))


CONSTANT, EVERY_SECOND = torch.tensor(0.3).expand(5), torch.arange(10.0)[::2]


@pytest.mark.parametrize(
    ("of_loss", "of_terms"), [(0.7, None), (None, CONSTANT), (None, EVERY_SECOND), (0.7, CONSTANT), (0.7, EVERY_SECOND)]
)
def test_gradients_of_loss_and_terms_meet(of_loss, of_terms) -> None:
    """Given from outside, in any layout: each term's own gradient, times what its weight and they say."""
    weights = {"nce_weight": 0.5, "atp_weight": 2.0, "cu_weight": 1.5}
    leaves = [x.requires_grad_() for x in embeddings(40, 16, torch.float32, 2)]
    numbers = (14.0, list(weights.values()), 2.0)
    scalars = Scalars(*(torch.tensor(number, dtype=torch.float64) for number in numbers))
    results = ops.loss(leaves, scalars, LossSpec(), "cpu", "", 1)
    given = (None if of_loss is None else torch.tensor(of_loss), of_terms)
    outputs, upstream = zip(*[(r, g) for r, g in zip(results, given, strict=True) if g is not None], strict=True)
    gradients = torch.autograd.grad(outputs, leaves, upstream)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = [torch.zeros_like(x) for x in exact]
    for term, (name, weight) in enumerate(weights.items()):
        alone = gap_loss(*exact, logit_scale=14.0, backend="reference", **dict.fromkeys(weights, 0.0) | {name: 1.0})
        times = weight * (of_loss or 0) + (0 if of_terms is None else of_terms[term].item())
        for total, gradient in zip(expected, torch.autograd.grad(alone, exact), strict=True):
            total += times * gradient
    for gradient, total in zip(gradients, expected, strict=True):
        assert (gradient - total).norm() <= 1e-5 * total.norm()


@pytest.mark.parametrize(
    "needs", [(True, False, False, False), (False, True, False, True), (False, False, False, True)]
)
@pytest.mark.parametrize("options", [OPTIONS["all terms"], OPTIONS["all pairs"]], ids=["anchor", "all"])
def test_a_step_computes_the_gradients_that_are_needed(planned, needs, options) -> None:
    z = embeddings(130, 64, torch.float32)
    assert_same_bits(evaluate(z, needs=needs, **options), planned(z, needs=needs, **options))


def test_a_step_takes_over_only_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are used at all, not for rows with gaps between their numbers, nor for rows that are not normalised."""
    taken = []
    forward = Step.forward
    monkeypatch.setattr(Step, "forward", lambda self, tensors: taken.append(tensors) or forward(self, tensors))
    z = embeddings(8, 6, torch.float32)
    evaluate(z)
    assert len(taken) == 1
    wide = [x.repeat_interleave(2, dim=1)[:, ::2] for x in z]
    assert_same_bits(evaluate(wide), evaluate(z))
    evaluate(z, normalize=False)
    assert len(taken) == 2


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [14.0, 3000.0], ids=["one pass", "sums below the range"])
def test_kept_similarities_change_no_bit(dtype, scale) -> None:
    """But those of the centroids of bf16: the sums multiply them exactly, their gradient alone would not."""
    options = {"cu_weight": 0.0} if dtype == torch.bfloat16 else {}
    z = embeddings(333, 100, dtype)
    kept = evaluate(z, scale, keep_similarities=True, **options)
    assert_same_bits(kept, evaluate(z, scale, keep_similarities=False, **options))
    assert_same_bits(kept, evaluate(z, scale, **options))


def test_nothing_is_kept_where_no_gradient_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = []
    forward = Step.forward
    monkeypatch.setattr(Step, "forward", lambda self, tensors: needed.append(self.needs_grad) or forward(self, tensors))
    z = [x.requires_grad_() for x in embeddings(8, 6, torch.float32, 2)]
    with torch.no_grad():
        quiet = gap_loss(*z, backend="cpu")
    assert torch.equal(quiet, gap_loss(*z, backend="cpu").detach())
    assert needed == [(False, False, False), (True, True, False)]


@pytest.mark.parametrize("tile_rows", [0, 1, 2, 3])
@pytest.mark.parametrize("symmetric", [False, True], ids=["pair", "centroids"])
@pytest.mark.parametrize("rows", [300, 333, 384])
def test_as_much_is_kept_as_there_is_room_for(rows, symmetric, tile_rows) -> None:
    """Rows of 128×64 tiles from the first on; of a symmetric matrix from its diagonal squares on."""
    backend, spec = cpu.create(), LossSpec()
    z = embeddings(rows, 64, torch.float32, 2)
    operands, statistics = backend.row_statistics(z, spec)
    t = torch.tensor(2.0, dtype=torch.float64)
    panels = -(-rows // 64)
    if symmetric:
        c = backend.centroids(z, statistics.sums, t, rows, spec)
        matrix = centroid_matrix(c, slice(0, rows), c, slice(0, rows))
        expected = sum(panels - 2 * r for r in range(tile_rows))
    else:
        matrix = Matrix(*operands[0], *operands[1], torch.tensor(14.0))
        expected = tile_rows * panels
    plain = backend.log_sums([matrix])
    sums = backend.log_sums([matrix], None, max(expected * 128 * 64 * 4, 1))
    assert not plain.entries
    (entries,) = sums.entries
    assert torch.equal(sums.rows, plain.rows)
    assert (0 if entries is None else entries.numel()) == expected * 128 * 64 * 4

    reference = plain.rows.max()
    prepared = PreparedSums(plain.rows - reference, plain.cols - reference, reference, reference, None)
    mass = torch.zeros(rows, dtype=torch.float64)
    of_pair = None if symmetric else SoftmaxSums(prepared.rows[0], prepared.cols[0], mass)
    products = []
    for m in (matrix, matrix._replace(entries=entries)):
        row_products, col_products = torch.zeros(rows, 64), torch.zeros(rows, 64)
        moment = None if symmetric else backend.moment_buffer(m)
        backend.add_products(m, of_pair, prepared, row_products, None if symmetric else col_products, moment)
        products.append([row_products, col_products, torch.zeros(1) if moment is None else moment])
    assert_same_bits(*products)


def test_what_is_kept_by_default_fits_its_budget() -> None:
    """At 4,096 rows the matrix of a pair does not fit as a whole."""
    backend, spec = cpu.create(), LossSpec()
    z = embeddings(4096, 32, torch.float32, 2)
    operands, _ = backend.row_statistics(z, spec)
    matrix = Matrix(*operands[0], *operands[1], torch.tensor(14.0))
    entries = backend.log_sums([matrix, matrix], None, spec.kept_bytes).entries
    assert [0 if e is None else e.numel() for e in entries] == [KEPT_SIMILARITY_BYTES, 0]
