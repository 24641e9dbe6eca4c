"""The functions of the CPU backend, one by one, against dense formulas in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from oracle import TOLERANCE
from torch import Tensor
from torch.nn import functional

from gapkernels import cpu as processor
from gapkernels import gap_loss, similarity_logsumexp, similarity_softplus
from gapkernels.backends import cpu
from gapkernels.backends.contract import NO_DIAGONAL, Matrix, Operand, PreparedSums, SoftmaxSums
from gapkernels.spec import LossSpec

if (reason := cpu.unusable_because()) is not None:
    pytest.skip(reason, allow_module_level=True)

LOG2_E = math.log2(math.e)
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EDGES = [
    (1, 1, 1),
    (2, 3, 7),
    (16, 16, 64),
    (63, 65, 33),
    (64, 64, 100),
    (127, 129, 32),
    (130, 257, 512),
    (300, 1100, 40),
]
"""Rows, columns and width: around the edges of vectors, panels of 64, tiles of 128 and blocks of 1024."""
ON_THREADS = [*((shape, 1) for shape in EDGES), (EDGES[-2], 2), (EDGES[-1], 2)]
"""Shapes and numbers of threads; smaller ones are left to one thread anyway."""


@pytest.fixture(scope="module")
def backend() -> object:
    return cpu.create()


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def strided(x: Tensor) -> Tensor:
    """The same numbers as a view into a larger storage, its rows at odd addresses."""
    storage = torch.full((x.shape[0] + 1, x.shape[1] + 3), torch.nan, dtype=x.dtype)
    view = storage[1:, 1 : 1 + x.shape[1]]
    view.copy_(x)
    return view


def vectors(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def used(operand: Operand, width: int) -> Tensor:
    """The vectors that an operand stands for, float64."""
    rows = operand.rows[:, :width].double()
    return rows if operand.factor is None else rows * operand.factor.double()[:, None]


def exponents(matrix: Matrix) -> Tensor:
    """x_ij in float64, −∞ on the diagonal."""
    scale = matrix.scale.double() * LOG2_E
    x = scale * matrix.rows.double() @ matrix.cols.double().T
    if matrix.biased:
        assert matrix.row_factor is not None
        assert matrix.col_factor is not None
        x = x + matrix.row_factor.double()[:, None] + matrix.col_factor.double()[None, :]
    else:
        if matrix.row_factor is not None:
            x = x * matrix.row_factor.double()[:, None]
        if matrix.col_factor is not None:
            x = x * matrix.col_factor.double()[None, :]
    i, j = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None, :]
    return torch.where(j == i + matrix.diagonal, -math.inf, x)


def pair(backend, rows: int, cols: int, width: int, dtype: torch.dtype, scale: float, diagonal: int = 0) -> Matrix:
    spec = LossSpec()
    left = backend.operand(strided(vectors(rows, width, dtype, 1)), spec)
    right = backend.operand(strided(vectors(cols, width, dtype, 2)), spec)
    return Matrix(*left, *right, torch.tensor(scale), None, diagonal)


def log2_sums(x: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(x * math.log(2), dim) / math.log(2)


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "threads"), ON_THREADS, ids=str, indirect=["threads"])
@pytest.mark.parametrize("norm", [1.0, 1e-30, 1e30, 0.0])
def test_operands_stand_for_unit_vectors(backend, threads, shape, dtype, norm) -> None:
    rows, _, width = shape
    if dtype == torch.float16 and norm not in (0.0, 1.0):
        pytest.skip("outside float16")
    x = strided((vectors(rows, width, torch.float64, 3) * norm).to(dtype))
    expected = torch.nn.functional.normalize(x.double(), dim=1)
    operand = backend.operand(x, LossSpec())
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    assert (used(operand, width) - expected).abs().max() <= rounding
    assert operand.rows[:, width:].abs().sum() == 0
    everything, _ = backend.row_statistics([x, x], LossSpec())
    assert torch.equal(everything[0].rows, operand.rows)
    assert torch.equal(everything[0].factor, operand.factor)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "threads"), ON_THREADS, ids=str, indirect=["threads"])
@pytest.mark.parametrize(("diagonal", "scale"), [(0, 1.0), (5, 100.0), (-3, 1e4), (NO_DIAGONAL, 1e4)])
def test_log_sums(backend, threads, shape, dtype, diagonal, scale) -> None:
    rows, cols, width = shape
    matrix = pair(backend, rows, cols, width, dtype, scale, diagonal)
    x = exponents(matrix)
    sums = backend.log_sums([matrix, matrix])
    # An exponent is rounded to float32, and so is the sum.
    tolerance = 1e-11 * scale if dtype == torch.float64 else 1e-5 + 2e-6 * scale
    for m in range(2):
        torch.testing.assert_close(sums.rows[m], log2_sums(x, 1), rtol=0, atol=tolerance)
        torch.testing.assert_close(sums.cols[m], log2_sums(x, 0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "threads"), [(2, 1), (63, 1), (128, 1), (130, 1), (2100, 1), (2100, 2)], indirect=["threads"]
)
def test_centroids(backend, threads, rows, dtype) -> None:
    """Sums and products of the symmetric matrix, of centroids as they are stored."""
    width, spec = 40, LossSpec(nce=False)  # 2100·40 numbers: enough for centroids in float16
    embeddings = [strided(vectors(rows, width, dtype, seed)) for seed in (1, 2)]
    _, statistics = backend.row_statistics(embeddings, spec)
    t = torch.tensor(2.0, dtype=torch.float64)
    c = backend.centroids(embeddings, statistics.sums, t, rows, spec)
    matrix = Matrix(c.rows, c.bias, c.rows, c.bias, c.scale, None, 0, True, True)
    x = exponents(matrix)
    sums = backend.log_sums([matrix])
    exact = dtype == torch.float64
    torch.testing.assert_close(sums.rows[0], log2_sums(x, 1), rtol=0, atol=1e-11 if exact else 2e-5)
    largest = sums.rows.max()
    zero = torch.zeros((), dtype=torch.float64)
    prepared = PreparedSums(zero, zero, zero, largest, None)
    start = 2.0**-7  # products are added; they are small, and next to a large number their digits would be lost
    products = torch.full(c.rows.shape, start, dtype=torch.float64 if exact else torch.float32)
    backend.add_products(matrix, None, prepared, products, None, None)
    expected = torch.exp2(x - largest) @ c.rows.double()
    first = torch.full_like(products, torch.nan)
    backend.add_products(matrix, None, prepared, first, None, None, True)
    assert error(first.double(), products.double() - start) <= (1e-12 if exact else 1e-6)
    # bf16 embeddings take bf16 products.
    assert error(products.double() - start, expected) <= {torch.float64: 1e-12, torch.bfloat16: 4e-3}.get(dtype, 1e-5)


@pytest.mark.parametrize("spread", [0.0, 300.0], ids=["one exponential", "two exponentials"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "threads"), [*ON_THREADS, ((2100, 1100, 20), 2)], ids=str, indirect=["threads"])
def test_products(backend, threads, shape, dtype, spread) -> None:
    rows, cols, width = shape
    matrix = pair(backend, rows, cols, width, dtype, 14.3, diagonal=1)
    x = exponents(matrix)
    row = x.amax(1).clamp_min(-1e3) + 3.0
    col = x.amax(0).clamp_min(-1e3) + 2.0
    row[::2] += spread
    reference = torch.tensor(0.7, dtype=torch.float64)
    prepared = PreparedSums(row[None] - reference, col[None] - reference, reference, reference, None)
    exact = dtype == torch.float64
    accumulator = torch.float64 if exact else torch.float32
    row_products = torch.zeros(matrix.rows.shape, dtype=accumulator)
    col_products = torch.zeros(matrix.cols.shape, dtype=accumulator)
    moment = backend.moment_buffer(matrix)
    sums = SoftmaxSums(prepared.rows[0], prepared.cols[0], torch.zeros(rows, dtype=torch.float64))
    backend.add_products(matrix, sums, prepared, row_products, col_products, moment)
    soft = torch.exp2(x - row[:, None]) + torch.exp2(x - col[None, :])
    assert matrix.row_factor is not None
    assert matrix.col_factor is not None
    h = soft * matrix.row_factor.double()[:, None] * matrix.col_factor.double()[None, :]
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 4e-3}.get(dtype, 2e-5)
    assert error(row_products, h @ matrix.cols.double()) <= tolerance
    assert error(col_products, h.T @ matrix.rows.double()) <= tolerance
    terms = soft * (x - reference).clamp_min(-1e30)
    assert abs(moment.sum() - terms.sum()) <= (1e-11 if exact else 1e-5) * terms.abs().sum().clamp_min(1e-30)
    alone = torch.zeros_like(row_products)
    backend.add_products(matrix, sums, prepared, alone, None, None)
    assert torch.equal(alone, row_products)
    alone = torch.zeros_like(col_products)
    backend.add_products(matrix, sums, prepared, None, alone, None)
    assert torch.equal(alone, col_products)
    for first_rows, first_cols in ((True, True), (True, False), (False, True)):
        both = [
            torch.full_like(products, torch.nan if first else 0.0)
            for products, first in ((row_products, first_rows), (col_products, first_cols))
        ]
        backend.add_products(matrix, sums, prepared, *both, None, first_rows, first_cols)
        assert torch.equal(both[0], row_products)
        assert torch.equal(both[1], col_products)


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0)])
def test_products_of_nothing_are_zero(backend, rows, cols) -> None:
    matrix = Matrix(torch.ones(rows, 3), None, torch.ones(cols, 3), None, torch.tensor(1.0), None, NO_DIAGONAL)
    zero = torch.zeros((), dtype=torch.float64)
    sums = SoftmaxSums(torch.zeros(rows).double(), torch.zeros(cols).double(), torch.zeros(rows).double())
    prepared = PreparedSums(sums.row[None], sums.col[None], zero, zero, None)
    totals = [torch.full((side, 3), torch.nan) for side in (rows, cols)]
    backend.add_products(matrix, sums, prepared, *totals, None, True, True)
    assert all((total == 0).all() for total in totals)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_any_shape_stride_and_offset(backend, threads, dtype) -> None:
    """Views into larger storages full of NaN, of shapes drawn at random, against the definition in float64."""
    draw = random.Random(f"{dtype} {threads}")
    edges = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]
    for _ in range(8):
        rows, width = draw.choice([*edges, draw.randint(2, 600)]), draw.choice([*edges, draw.randint(1, 200)])
        modalities, scale = draw.choice([2, 2, 3]), draw.choice([1.0, 14.3, 100.0])
        options = {"cu_weight": float(rows > 1), "normalize_centroids": draw.random() < 0.8, "anchor": modalities - 1}
        views = []
        for m in range(modalities):
            above, left, right = draw.randint(0, 2), draw.randint(0, 3), draw.randint(0, 5)
            storage = torch.full((above + rows, left + width + right), torch.nan, dtype=dtype)
            view = storage[above:, left : left + width]
            view.copy_(vectors(rows, width, torch.float64, m) + 2 * vectors(rows, width, torch.float64, 9))
            views.append(view.detach().requires_grad_())
        case = f"{rows}×{width}, {[(v.stride(), v.storage_offset()) for v in views]}, scale {scale}, {options}"
        exact = [v.detach().double().requires_grad_() for v in views]
        loss_scale = rows if dtype == torch.float16 else 1.0
        terms = gap_loss(*views, logit_scale=scale, backend="cpu", return_terms=True, **options)
        expected = gap_loss(*exact, logit_scale=scale, backend="reference", return_terms=True, **options)
        size = sum(abs(t.item()) for t in expected[1:4] if t is not None)
        assert abs(terms.loss.item() - expected.loss.item()) <= TOLERANCE[dtype].loss * max(size, 0.1), case
        (terms.loss * loss_scale).backward()
        (expected.loss * loss_scale).backward()
        natural = loss_scale * scale / rows**0.5 / exact[0].detach().norm(dim=1).median().item()
        for view, e in zip(views, exact, strict=True):
            if width == 1:
                e.grad.zero_()  # nothing can move on a sphere of two points
            bound = TOLERANCE[dtype].gradient * max(e.grad.norm().item(), 0.03 * natural)
            assert (view.grad.double() - e.grad).norm().item() <= bound, case


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_the_same_bits_each_time(backend, threads, dtype) -> None:
    embeddings = [vectors(400, 64, dtype, seed).requires_grad_() for seed in (1, 2, 3)]

    def run() -> list[Tensor]:
        loss = gap_loss(*embeddings, logit_scale=torch.tensor(20.0), backend="cpu")
        return [loss, *torch.autograd.grad(loss, embeddings)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.fixture
def medium() -> Iterator[None]:
    """torch is asked for faster, less precise products of float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_torch_can_be_told_to_multiply_float32_in_bfloat16(backend, medium, monkeypatch, name) -> None:
    """Where the processor has such products; loss and gradients stay float32."""
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: True)
    embeddings = [vectors(200, 128, torch.float32, seed).requires_grad_() for seed in (1, 2)]
    loss = gap_loss(*embeddings, logit_scale=14.3, backend=name)
    gradients = torch.autograd.grad(loss, embeddings)

    rounded = [e.detach().bfloat16().double().requires_grad_() for e in embeddings]
    oracle = gap_loss(*rounded, logit_scale=14.3, backend="reference")
    assert loss.dtype == torch.float32
    assert abs(loss.item() - oracle.item()) <= 1e-5 * abs(oracle.item())
    for gradient, expected in zip(gradients, torch.autograd.grad(oracle, rounded), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() <= 4e-3 * expected.norm()
    plain = gap_loss(*embeddings, logit_scale=14.3, backend="reference")
    assert abs(loss.item() - plain.item()) > 1e-5 * abs(plain.item())

    compiled = torch.compile(gap_loss, fullgraph=True)(*embeddings, logit_scale=14.3, backend=name)
    assert torch.equal(compiled, loss)


@pytest.mark.parametrize("name", ["logsumexp", "softplus"])
def test_sums_follow_the_switch_as_losses_do(backend, medium, monkeypatch, name) -> None:
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: True)

    def dense(*embeddings: Tensor) -> Tensor:
        rows, cols = (functional.normalize(e.double()) for e in embeddings)
        logits = 14.3 * rows @ cols.T
        if name == "logsumexp":
            return logits.fill_diagonal_(-math.inf).logsumexp(1)
        return functional.softplus(logits - 5).fill_diagonal_(0).sum(1)

    embeddings = [vectors(200, 128, torch.float32, seed) for seed in (1, 2)]
    if name == "logsumexp":
        sums = similarity_logsumexp(*embeddings, logit_scale=14.3, backend="cpu").rows
    else:
        sums, _ = similarity_softplus(*embeddings, logit_scale=14.3, logit_bias=-5.0, backend="cpu")
    rounded, plain = dense(*(e.bfloat16() for e in embeddings)), dense(*embeddings)
    assert (sums - rounded).abs().max() <= 1e-5 * rounded.abs().max()
    assert (sums - plain).abs().max() > 1e-5 * plain.abs().max()


def test_float32_is_not_rounded_unless_products_of_bfloat16_are_fast(backend, medium, monkeypatch) -> None:
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: False)
    embeddings = [vectors(200, 128, torch.float32, seed) for seed in (1, 2)]
    loss, oracle = (
        gap_loss(*(e.to(t) for e in embeddings), backend=name)
        for name, t in (("cpu", torch.float32), ("reference", torch.float64))
    )
    assert abs(loss.item() - oracle.item()) <= 1e-6 * abs(oracle.item())


def test_errors_name_what_is_wrong(backend) -> None:
    matrix = pair(backend, 4, 4, 8, torch.float32, 1.0)
    with pytest.raises(ValueError, match="agree in type"):
        backend.log_sums([matrix._replace(row_factor=torch.ones(4, dtype=torch.float64))])
    prepared = PreparedSums(*[torch.zeros((), dtype=torch.float64)] * 4, None)
    with pytest.raises(ValueError, match="float64 was expected"):
        backend.add_products(matrix, SoftmaxSums(torch.zeros(4), torch.zeros(4), torch.zeros(4)), prepared, *[None] * 3)
