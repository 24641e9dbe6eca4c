"""Gradient caching: the exact gradient of a loss over a large batch with the activations of a micro-batch in memory.

A contrastive loss couples every sample of a batch with every other, so plain gradient accumulation, which sums the
losses of small batches, computes something else. The chain rule splits the work at the embeddings instead:

    1. encode micro-batches without a graph          z_k = f(x_k; θ)            keeps [N, D], no activations
    2. one loss over all embeddings                  L(z), ∂L/∂z                O(N·D) with this library's loss
    3. encode again, with a graph, one at a time     ∂L/∂θ += (∂z_k/∂θ)ᵀ ∂L/∂z_k

The price is one more forward pass through the encoders; no number changes as long as the second encoding repeats the
first. For that the state of torch's random number generators is replayed, so dropout and augmentation agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

MicroBatch = TypeVar("MicroBatch")


class GradientCache(Generic[MicroBatch]):
    """One training step over a batch that is encoded in micro-batches.

    The constructor encodes every micro-batch without a graph. A loss of `embeddings` is then formed and
    differentiated in the usual way, which also reaches parameters of the loss itself, such as a learned logit scale.
    `backward` finally encodes again with a graph and accumulates the gradients of the encoders' parameters.

    What must hold for the gradient to be that of the direct step:

    - A sample's embedding depends on that sample alone. Batch norm breaks this: its statistics are then those of a
      micro-batch (the gradient is exact for that model, often called ghost batch norm), and its running averages move
      twice per step, once per encoding.
    - Random numbers come from torch's default generators, of the CPU and of the accelerator in use. What draws from
      Python's, NumPy's or a generator of its own must happen before the micro-batches are handed over.

    Under `torch.autocast` build the cache and call `backward` in the same autocast context, so that both encodings
    compute the same; gradients are formed outside it, as always. A `GradScaler` scales the loss as in a direct step.

    Args:
        encode: turns a micro-batch into one embedding [n, D] per modality, any number of them; called twice for each
            micro-batch, without and with gradient.
        micro_batches: the parts of the batch, in order and of any sizes; whatever `encode` takes.

    Raises:
        ValueError: if there is no micro-batch.
        TypeError: if `encode` returns something other than a sequence of tensors.

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

    def __init__(self, encode: Callable[[MicroBatch], Sequence[Tensor]], micro_batches: Sequence[MicroBatch]) -> None:
        if not len(micro_batches):
            raise ValueError("`micro_batches` must hold at least one micro-batch, got none")
        self._encode = encode
        self._micro_batches = micro_batches
        self._random_states = []
        parts = []
        with torch.no_grad():
            for micro_batch in micro_batches:
                self._random_states.append(_random_state())
                parts.append(_check_encoded(encode(micro_batch)))
        self._sizes = [part[0].shape[0] for part in parts]
        self.embeddings = tuple(torch.cat(modality).requires_grad_() for modality in zip(*parts, strict=True))

    def backward(self, no_sync: Callable[[], AbstractContextManager[Any]] | None = None) -> None:
        """Encode again, with a graph, and accumulate the gradients of the encoders' parameters.

        The gradients of `embeddings` are what was cached; an embedding without one takes no part. torch's random
        number generators end in the state they have at the call.

        Args:
            no_sync: for encoders in `DistributedDataParallel`, its method `no_sync`: gradients are then averaged over
                processes once, with the last micro-batch, instead of with each.

        Raises:
            RuntimeError: if no embedding has a gradient yet.
        """
        gradients = [None if z.grad is None else z.grad.split(self._sizes) for z in self.embeddings]
        if all(gradient is None for gradient in gradients):
            raise RuntimeError("no gradient is cached: call backward() on a loss of `embeddings` first")
        state_after = _random_state()
        last = len(self._micro_batches) - 1
        for number, (micro_batch, state) in enumerate(zip(self._micro_batches, self._random_states, strict=True)):
            with no_sync() if no_sync is not None and number < last else nullcontext():
                _set_random_state(state)
                with torch.enable_grad():
                    encoded = self._encode(micro_batch)
                pairs = [
                    (z, gradient[number])
                    for z, gradient in zip(encoded, gradients, strict=True)
                    if gradient is not None and z.requires_grad  # a frozen encoder has nothing to learn
                ]
                if pairs:
                    _backward_outside_autocast(*zip(*pairs, strict=True))
                del encoded, pairs  # the graph of this micro-batch, before the next one is built
        _set_random_state(state_after)


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
