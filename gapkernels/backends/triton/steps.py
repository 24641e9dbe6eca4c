"""Evaluations of one kind: the first is planned, the second planned and recorded, the others repeated.

See ``.recording`` for what is repeated and why. The kind of an evaluation is what the plan and the launchers look at:
what is computed, shapes, types and strides, which addresses are multiples of 16, which gradients are needed, and
torch's switches for deterministic results and for the precision of float32 products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from gapkernels.backends.contract import Forward, Kept, Saved, upstream_of
from gapkernels.backends.triton.device import INTERPRETED
from gapkernels.backends.triton.launch import can_repeat
from gapkernels.backends.triton.recording import Recording, recorded
from gapkernels.spec import LossSpec

LARGEST = 2**22
"""Numbers in one modality, beyond which the host does not matter and memory does."""

MOST_ROWS = 4096
"""Likewise of rows: gradients of more take several blocks."""

MOST_KINDS = 64

enabled = not INTERPRETED
"""In the interpreter only tests want it: what they change would not be seen."""


class Steps:
    """The kinds of evaluations that one backend has seen."""

    def __init__(self) -> None:
        self._steps: dict[tuple[Any, ...], Step | None] = {}

    def find(self, spec: LossSpec, needs_grad: tuple[bool, ...], tensors: tuple[Tensor, ...]) -> Step | None:
        """The evaluations like this one; None of the first, and where evaluations are planned every time.

        Args:
            spec: what is computed.
            needs_grad: which gradients are.
            tensors: logit scale, weights, sharpness, and the embeddings, which are alike in shape and type.
        """
        shape = tensors[3].shape
        if not enabled or shape[0] > MOST_ROWS or shape[0] * shape[1] > LARGEST:
            return None
        addresses = [t.data_ptr() for t in tensors]
        key = (
            spec,
            needs_grad,
            shape,
            len(set(addresses)) == len(addresses),
            tensors[0].dtype,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            *[address & 15 == 0 for address in addresses],
            *[e.stride() for e in tensors[3:]],
        )
        try:
            step = self._steps[key]
        except KeyError:
            if len(self._steps) >= MOST_KINDS:
                self._steps.clear()
            self._steps[key] = None
            return None
        if step is None:
            step = self._steps[key] = Step()
        return step if not step.refused and can_repeat() else None

    @property
    def described(self) -> list[str]:
        """Why evaluations are planned every time, of each kind that is; ``""`` of one that is repeated."""
        return [step.refused for step in self._steps.values() if step is not None]


class Step:
    """Evaluations of one kind.

    Attributes:
        refused: why they cannot be repeated; empty if they can, or nobody tried.
    """

    def __init__(self) -> None:
        self.refused = ""
        self._forward: Recording | None = None
        self._backward: Recording | None = None
        self._kept_shape: tuple[int, ...] = ()

    @property
    def repeats_forward(self) -> bool:
        """Whether the forward pass has been recorded."""
        return self._forward is not None

    @property
    def repeats_backward(self) -> bool:
        """Whether the backward pass has been recorded, and nothing speaks against repeating it now."""
        return self._backward is not None and can_repeat()

    def record_forward(self, tensors: tuple[Tensor, ...], run: Callable[[], Forward]) -> Forward:
        """Run the forward pass by the plan, and remember it.

        Args:
            tensors: as for ``Steps.find``.
            run: runs it.
        """
        with recorded() as recorder:
            result = run()
        saved: list[Tensor | None] = []
        if result.kept is not None:
            kept, self._kept_shape = result.kept.flattened()
            saved = [*result.saved, *kept]
        recording = Recording(recorder, tensors, (), (result.loss, result.terms), saved)
        self.refused = recording.refused
        if not self.refused:
            self._forward = recording
        return result

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """``(loss, terms, workspace)`` by repeating the launches."""
        assert self._forward is not None
        (loss, terms), workspace = _repeated(self._forward, tensors, ())
        return loss, terms, workspace

    def saved(self, workspace: Tensor) -> tuple[Saved, Kept]:
        """What a repeated forward pass has left in its workspace."""
        assert self._forward is not None
        tensors: list[Any] = [p and p.of([workspace]) for p in self._forward.kept_places]
        count = len(Saved._fields)
        return Saved(*tensors[:count]), Kept.from_flattened(tensors[count:], self._kept_shape)

    def record_backward(
        self,
        tensors: tuple[Tensor, ...],
        upstream: Tensor,
        saved: Saved,
        kept: Kept,
        run: Callable[[], tuple[list[Tensor | None], Tensor | None]],
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Run the backward pass by the plan, and remember it.

        Args:
            tensors: as for ``Steps.find``.
            upstream: see ``gapkernels.plan.backward``.
            saved, kept: by the forward pass.
            run: runs it.
        """
        with recorded() as recorder:
            gradients, scale_gradient = run()
        if self._forward is None or self._backward is not None:
            return gradients, scale_gradient
        outputs = [g for g in (*gradients, scale_gradient) if g is not None]
        places = zip((*saved, *kept.flattened()[0]), self._forward.kept_places, strict=True)
        known = [(tensor, place) for tensor, place in places if tensor is not None and place is not None]
        recording = Recording(recorder, (*tensors, upstream), known, outputs, ())
        self.refused = recording.refused
        if not self.refused:
            self._backward = recording
        return gradients, scale_gradient

    def backward(
        self, tensors: tuple[Tensor, ...], grad_loss: Tensor | None, grad_terms: Tensor | None, workspace: Tensor
    ) -> list[Tensor]:
        """Those gradients that are needed, the scale's last, by repeating the launches.

        Args:
            tensors: as for ``Steps.find``.
            grad_loss, grad_terms: see ``gapkernels.backends.contract.upstream_of``.
            workspace: by the forward pass.
        """
        assert self._backward is not None
        upstream = upstream_of(grad_loss, grad_terms, tensors[1])
        return _repeated(self._backward, (*tensors, upstream), (workspace,))[0]


def _repeated(
    recording: Recording, inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...]
) -> tuple[list[Tensor], Tensor]:
    """Outputs of a recorded pass, and the workspace of what it kept."""
    device = inputs[3].device
    empty = torch.empty
    outputs = [empty(shape, dtype=dtype, device=device) for shape, dtype in recording.outputs]
    kept = empty(recording.kept_bytes, dtype=torch.uint8, device=device)
    scratch = empty(recording.scratch_bytes, dtype=torch.uint8, device=device)
    bases = (*inputs, *saved, *outputs, kept, scratch)
    if INTERPRETED:
        recording.run_by_triton(bases)
        return outputs, kept
    driver = triton.runtime.driver.active
    index = driver.get_current_device()
    addresses = tuple([base.data_ptr() for base in bases])
    if device.index in (index, None):
        recording.run(addresses, driver.get_current_stream(index))
    else:
        with torch.cuda.device(device):
            recording.run(addresses, driver.get_current_stream(device.index))
    return outputs, kept
