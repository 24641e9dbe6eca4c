"""The grid of inputs and the comparison with the float64 oracle that the tests of every backend share."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.oracle import loss_and_gradients, relative_error
from gapkernels import gap_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Tolerance(NamedTuple):
    """Largest relative error of loss and terms, and of gradients norm-wise."""

    loss: float
    gradient: float


# float32: accumulation in float32. bf16, fp16: gradients are returned in that type and pass through products of it.
TOLERANCE = {
    torch.float64: Tolerance(1e-12, 1e-10),
    torch.float32: Tolerance(1e-5, 1e-5),
    torch.bfloat16: Tolerance(1e-5, 4e-3),
    torch.float16: Tolerance(1e-5, 1e-3),
}


def random_embeddings(
    n: int, dim: int, modalities: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, noise: float = 1.0
) -> list[Tensor]:
    """Rows that share a component across modalities, the more the smaller ``noise`` is."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return [
        (shared + noise * torch.randn(n, dim, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)
        for _ in range(modalities)
    ]


def trained_embeddings(n: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Two modalities as a trained model with a narrow cone leaves them: every cosine near one, hard negatives.

    Positives near 0.99, negatives near 0.91: at a logit scale of 100 all negatives together weigh about as much as the
    positive, and exponents of 130 have to be right to 1e-5.
    """
    generator = torch.Generator().manual_seed(seed)
    cone, shared = (torch.randn(rows, dim, generator=generator, dtype=torch.float64) for rows in (1, n))
    noise = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    return [(cone + 0.3 * shared + 0.1 * own).to(dtype).to(DEVICE) for own in noise]


def skip_unsupported(backend: str, dtype: torch.dtype) -> None:
    """Skip the test where a backend refuses a type by design."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip('float64 is computed by backend="torch"')


def assert_matches_oracle(
    embeddings: list[Tensor],
    scale: float,
    backend: str,
    tolerance: Tolerance | None = None,
    gradient_floor: float = 0.03,
    **options: object,
) -> None:
    """Compare loss, terms, diagnostics and all gradients with the definition evaluated in float64 on the same inputs.

    Gradients are compared norm-wise. Where the true gradient vanishes (collapsed rows, D = 1) a relative error means
    nothing, so errors are taken relative to at least ``gradient_floor`` times the size a gradient of this loss has.
    """
    skip_unsupported(backend, embeddings[0].dtype)
    tolerance = tolerance or TOLERANCE[embeddings[0].dtype]
    statistics_scale = torch.tensor(scale, dtype=torch.float64, device=embeddings[0].device)
    ours = [e.detach().clone().requires_grad_() for e in embeddings]
    oracle = [e.detach().double().requires_grad_() for e in embeddings]
    our_scale, oracle_scale = statistics_scale.clone().requires_grad_(), statistics_scale.clone().requires_grad_()
    terms = gap_loss(*ours, logit_scale=our_scale, backend=backend, return_terms=True, **options)
    expected = gap_loss(*oracle, logit_scale=oracle_scale, backend="reference", return_terms=True, **options)
    for name, value in expected._asdict().items():
        actual = getattr(terms, name)
        if value is None:
            assert actual is None, name
            continue
        # The total may cancel (CU is negative), so its error is measured against the size of its parts.
        # CU is the logarithm of a mean of numbers near one when centroids nearly coincide: rounded absolutely there.
        floor = {"modality_gap": 1e-6, "true_pair_cosine": 1e-6, "centroid_uniformity": 1e-2}.get(name, 0.0)
        size = max(abs(value.item()), floor)
        if name == "loss":
            size = max(size, sum(abs(t.item()) for t in expected[1:4] if t is not None) / 3)
        oracle_rounding = 1e-15 * scale  # cross-entropy from log-soft-max: absolute, in the exponents
        assert abs(actual.item() - value.item()) <= tolerance.loss * size + oracle_rounding, (name, actual, value)

    # A float16 gradient of 1e-6 is subnormal: users of float16 scale the loss (torch.amp.GradScaler), and so do we.
    loss_scale = embeddings[0].shape[0] / max(scale, 4.0) if embeddings[0].dtype == torch.float16 else 1.0
    (terms.loss * loss_scale).backward()
    (expected.loss * loss_scale).backward()
    n = embeddings[0].shape[0]
    norms = torch.cat([e.detach().double().norm(dim=1) for e in embeddings]).clamp_min(1e-12)
    natural = loss_scale * (scale if options.get("nce_weight", 1) else 1) / n**0.5 / norms.median().item()
    for index, (a, b) in enumerate(zip(ours, oracle, strict=True)):
        assert a.grad.dtype == a.dtype
        if a.shape[1] == 1 and options.get("normalize", True):
            # Nothing can move on a sphere of two points. The oracle's own rounding, times 1/eps where a centroid
            # vanishes, would be all that is compared.
            b.grad.zero_()
        error = (a.grad.double() - b.grad).norm().item()
        assert error <= tolerance.gradient * max(b.grad.norm().item(), gradient_floor * natural), (
            f"gradient of embedding {index}: error {error:.3e}, norm {b.grad.norm():.3e}, natural size {natural:.3e}"
        )
    if options.get("nce_weight", 1):
        error = abs(our_scale.grad.item() - oracle_scale.grad.item())
        # d InfoNCE/d scale is a difference of mean cosines, which are at most ‖x‖‖y‖
        size = max(abs(oracle_scale.grad.item()), 0.03 * loss_scale if options.get("normalize", True) else 0.0)
        assert error <= max(tolerance.loss, 1e-5 if ours[0].dtype != torch.float64 else 0) * 2 * size, (
            our_scale.grad,
            oracle_scale.grad,
        )


def assert_matches_chunked_oracle(embeddings: list[Tensor], scale: float, backend: str) -> None:
    """Compare loss and gradients of two modalities, too many rows for the definition's N×N matrices."""
    dtype = embeddings[0].dtype
    loss_scale = float(len(embeddings[0])) if dtype == torch.float16 else 1.0
    ours = [e.clone().requires_grad_() for e in embeddings]
    loss = gap_loss(*ours, logit_scale=scale, backend=backend)
    (loss * loss_scale).backward()
    expected, gradients = loss_and_gradients(embeddings, scale)
    assert abs(loss.item() - expected) <= TOLERANCE[dtype].loss * abs(expected)
    for e, gradient in zip(ours, gradients, strict=True):
        assert relative_error([e.grad.double() / loss_scale], [gradient]) <= TOLERANCE[dtype].gradient
