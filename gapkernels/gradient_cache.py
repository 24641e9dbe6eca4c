"""Gradient caching: the exact gradient of a loss over a large batch with the activations of a micro-batch in memory.

A contrastive loss couples every sample of a batch with every other, so plain gradient accumulation, which sums the
losses of small batches, computes something else. The chain rule splits the work at the embeddings instead:

    1. encode micro-batches without a graph          z_k = f(x_k; θ)            keeps [N, D], no activations
    2. one loss over all embeddings                  L(z), ∂L/∂z                O(N·D) with this library's loss
    3. encode again, with a graph, one at a time     ∂L/∂θ += (∂z_k/∂θ)ᵀ ∂L/∂z_k

The price is one more forward pass through the encoders; no number changes as long as the second encoding repeats the
first. For that the state of torch's random number generators is replayed, so dropout and augmentation agree; and each
second encoding is compared with the first, O(N·D), before it reaches any gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

MicroBatch = TypeVar("MicroBatch")

# How far two encodings of a row may lie apart, relative to its largest entry: with and without a graph torch may choose
# other kernels, which round elsewhere. By the lowest precision that took part.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32_TOLERANCE = 1e-2


class GradientCache(Generic[MicroBatch]):
    """One training step over a batch that is encoded in micro-batches.

    The constructor encodes every micro-batch without a graph. A loss of `embeddings` is then formed and
    differentiated in the usual way, which also reaches parameters of the loss itself, such as a learned logit scale.
    `backward` finally encodes again with a graph and accumulates the gradients of the encoders' parameters.

    What must hold for the gradient to be that of the direct step:

    - A sample's embedding depends on that sample alone. Batch norm breaks this: its statistics are then those of a
      micro-batch (the gradient is exact for that model, often called ghost batch norm), and its running averages move
      twice per step, once per encoding.
    - The second encoding repeats the first: the same samples in the same order, the same weights, the same mode
      (`train` or `eval`), and no input that `encode` changes in place. `backward` raises where it does not.
    - Random numbers come from torch's default generators, of the CPU and of the accelerator in use. What draws from
      Python's, NumPy's or a generator of its own must happen before the micro-batches are handed over.

    Under `torch.autocast` build the cache and call `backward` in the same autocast context, so that both encodings
    compute the same; gradients are formed outside it, as always. A `GradScaler` scales the loss as in a direct step.

    Args:
        encode: turns a micro-batch into one embedding [n, D] per modality, any number of them; called twice for each
            micro-batch, without and with gradient.
        micro_batches: the parts of the batch, in order and of any sizes; whatever `encode` takes. They are gone through
            twice and must be the same both times. A generator, which can be read only once, is kept in a list.
        tolerance: largest difference between the two encodings of a row, relative to its largest entry. By default it
            follows the lowest precision in the graph of the second one: 1e-8 for float64, 1e-4 for float32 (1e-2 where
            the device may multiply in TF32), 1e-2 for float16 and 5e-2 for bfloat16.

    Raises:
        ValueError: if there is no micro-batch, or `tolerance` is no positive number.
        TypeError: if `encode` returns something other than a sequence of tensors, or `micro_batches` is no sequence.

    Source:
        Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
        RepL4NLP 2021, arXiv 2101.06983.

    Examples:
        >>> from gapkernels import gap_loss
        >>> image_tower, text_tower = torch.nn.Linear(6, 4), torch.nn.Linear(5, 4)
        >>> images, texts = torch.randn(32, 6), torch.randn(32, 5)
        >>> step = GradientCache(
        ...     lambda part: (image_tower(part[0]), text_tower(part[1])), list(zip(images.split(8), texts.split(8)))
        ... )
        >>> gap_loss(*step.embeddings).backward()
        >>> step.backward()
        >>> image_tower.weight.grad.shape
        torch.Size([4, 6])

    Attributes:
        embeddings: one [N, D] leaf per modality that requires gradient, in the dtype that `encode` returned.
    """

    def __init__(
        self,
        encode: Callable[[MicroBatch], Sequence[Tensor]],
        micro_batches: Iterable[MicroBatch],
        *,
        tolerance: float | None = None,
    ) -> None:
        if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
            raise ValueError(f"`tolerance` must be a positive number, got {tolerance!r}")
        if not isinstance(micro_batches, Iterable) and not hasattr(micro_batches, "__getitem__"):
            raise TypeError(f"`micro_batches` must be a sequence of micro-batches, got {type(micro_batches).__name__}")
        self._encode = encode
        self._micro_batches = list(micro_batches) if isinstance(micro_batches, Iterator) else micro_batches
        self._tolerance = tolerance
        self._random_states = []
        parts = []
        with torch.no_grad():
            for micro_batch in self._micro_batches:
                self._random_states.append(_random_state())
                parts.append(_check_encoded(encode(micro_batch)))
        if not parts:
            raise ValueError("`micro_batches` must hold at least one micro-batch, got none")
        if len({len(part) for part in parts}) > 1:
            raise ValueError(
                f"`encode` must return as many embeddings for every micro-batch, got {[len(part) for part in parts]}"
            )
        by_modality = list(zip(*parts, strict=True))
        self._sizes = [[z.shape[0] for z in modality] for modality in by_modality]
        self.embeddings = tuple(torch.cat(modality).requires_grad_() for modality in by_modality)

    def backward(self, no_sync: Callable[[], AbstractContextManager[Any]] | None = None) -> None:
        """Encode again, with a graph, and accumulate the gradients of the encoders' parameters.

        The gradients of `embeddings` are what was cached; an embedding without one takes no part. torch's random
        number generators end in the state they have at the call, whatever happens in between.

        Args:
            no_sync: for encoders in `DistributedDataParallel`, its method `no_sync`: gradients are then averaged over
                processes once, with the last micro-batch, instead of with each.

        Raises:
            RuntimeError: if no embedding has a gradient yet, or if a micro-batch is not encoded as it was the first
                time: the gradient would be that of another loss. The message names the first row that differs. Nothing
                of that micro-batch has then reached a gradient.
        """
        if all(z.grad is None for z in self.embeddings):
            raise RuntimeError("no gradient is cached: call backward() on a loss of `embeddings` first")
        state_after = _random_state()
        try:
            self._encode_again(no_sync)
        finally:
            _set_random_state(state_after)

    def _encode_again(self, no_sync: Callable[[], AbstractContextManager[Any]] | None) -> None:
        count = len(self._random_states)
        first = [z.detach().split(sizes) for z, sizes in zip(self.embeddings, self._sizes, strict=True)]
        gradients = [
            [None] * count if z.grad is None else z.grad.split(sizes)
            for z, sizes in zip(self.embeddings, self._sizes, strict=True)
        ]
        done = 0
        for micro_batch in self._micro_batches:
            if done == count:
                raise RuntimeError(f"`micro_batches` held {count} micro-batches the first time and holds more now")
            with no_sync() if no_sync is not None and done < count - 1 else nullcontext():
                _set_random_state(self._random_states[done])
                with torch.enable_grad():
                    encoded = _check_encoded(self._encode(micro_batch))
                self._compare(encoded, [parts[done] for parts in first], done)
                pairs = [
                    (z, parts[done])
                    for z, parts in zip(encoded, gradients, strict=True)
                    if parts[done] is not None and z.requires_grad  # a frozen encoder has nothing to learn
                ]
                if pairs:
                    _backward_outside_autocast(*zip(*pairs, strict=True))
                del encoded, pairs  # the graph of this micro-batch, before the next one is built
            done += 1
        if done < count:
            raise RuntimeError(f"`micro_batches` held {count} micro-batches the first time and {done} now")

    def _compare(self, encoded: Sequence[Tensor], first: Sequence[Tensor], number: int) -> None:
        """Raise unless a micro-batch's second encoding repeats the first, to rounding."""
        shapes, shapes_before = ([list(z.shape) for z in part] for part in (encoded, first))
        if shapes != shapes_before:
            raise RuntimeError(
                f"micro-batch {number} was encoded into embeddings of shape {shapes_before} the first time and "
                f"{shapes} now: {_REMEDY}"
            )
        for index, (z, before) in enumerate(zip(encoded, first, strict=True)):
            difference = _relative_difference(z.detach(), before)
            tolerance = self._tolerance or _TOLERANCES.get(z.dtype, _TOLERANCES[torch.bfloat16])
            # NaN, where one of the two is not a number, is within no tolerance.
            if bool((difference <= tolerance).all()):
                continue
            if self._tolerance is None:
                tolerance = max(tolerance, _working_tolerance(z))
            beyond = (difference <= tolerance).logical_not()
            if beyond.any():
                row = int(beyond.nonzero()[0])
                raise RuntimeError(
                    f"row {sum(self._sizes[index][:number]) + row} of `embeddings[{index}]` (row {row} of micro-batch "
                    f"{number}) is not what it was the first time: it differs by {float(difference[row]):.1e} of its "
                    f"largest entry, more than {tolerance:.0e}. {_REMEDY}"
                )


_REMEDY = (
    "`encode` must give the same embeddings both times it is called: no shuffling between the calls, no input changed "
    "in place, the same weights and mode, random numbers from torch's default generators only"
)


def _relative_difference(z: Tensor, before: Tensor) -> Tensor:
    """Return the largest difference in each row, relative to the row's largest finite entry: ``[n]``, NaN for NaN."""
    wide = torch.promote_types(z.dtype, torch.float32)
    now, then = z.to(wide).flatten(1), before.to(wide).flatten(1)
    same = (now == then) | (now.isnan() & then.isnan())
    apart = (now - then).abs().masked_fill_(same, 0)
    largest = torch.maximum(now.abs(), then.abs())
    # What overflowed to infinity in one encoding only is within no tolerance, and sets no scale.
    apart.masked_fill_(apart.isinf(), torch.nan)
    largest.masked_fill_(largest.isfinite().logical_not_(), 0)
    apart, largest = (_row_max(x) for x in (apart, largest))
    return torch.where(apart == 0, apart, apart / largest)


def _row_max(x: Tensor) -> Tensor:
    return x.amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])


def _working_tolerance(z: Tensor) -> float:
    """Return the tolerance for the lowest precision in the graph that computed `z`; autocast hides behind float32."""
    found, seen, nodes = {z.dtype}, set(), [z.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {entry.dtype for entry in node._input_metadata}
        nodes += [following for following, _ in node.next_functions]
    tolerances = [_TOLERANCES[dtype] for dtype in found if dtype in _TOLERANCES]
    if z.is_cuda and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32):
        tolerances.append(_TF32_TOLERANCE)
    return max(tolerances, default=_TOLERANCES[torch.bfloat16])


def _check_encoded(encoded: Sequence[Tensor]) -> Sequence[Tensor]:
    """Refuse a single tensor: iterating over it would take its rows for modalities."""
    if isinstance(encoded, Tensor) or not all(isinstance(z, Tensor) for z in encoded):
        raise TypeError(f"`encode` must return a sequence of tensors, one per modality, got {type(encoded).__name__}")
    return encoded


def _backward_outside_autocast(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Differentiate with autocast switched off: on the CPU the backward operators would obey it too."""
    with torch.autocast(outputs[0].device.type, enabled=False):
        torch.autograd.backward(list(outputs), list(gradients))


def _random_state() -> dict[str, Tensor]:
    """Return the state of torch's default generators by device type."""
    states = {"cpu": torch.get_rng_state()}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        states[accelerator.type] = torch.get_device_module(accelerator).get_rng_state()
    return states


def _set_random_state(states: dict[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state)
