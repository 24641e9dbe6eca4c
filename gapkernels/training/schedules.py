"""Learning rate and loss weights as functions of training progress."""

from __future__ import annotations

import math
from typing import NamedTuple

from gapkernels.training.config import Method, Ramp


def cosine_with_warmup(step: int, total_steps: int, warmup: float) -> float:
    """Return the factor on the peak learning rate: linear from 0 to 1 during the warm-up, then half a cosine to 0.

    Args:
        step: optimiser steps already taken.
        total_steps: steps of the whole run.
        warmup: fraction of the run spent on the warm-up.
    """
    warmup_steps = int(warmup * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def ramp_value(ramp: Ramp, progress: float) -> float:
    """Return a weight at `progress`, a fraction of training in [0, 1]."""
    if progress <= ramp.start:
        return ramp.initial
    if progress >= ramp.stop:
        return ramp.final
    return ramp.initial + (ramp.final - ramp.initial) * (progress - ramp.start) / (ramp.stop - ramp.start)


class LossWeights(NamedTuple):
    """Weights of InfoNCE, align true pairs and centroid uniformity."""

    nce: float
    atp: float
    cu: float


def loss_weights(method: Method, progress: float) -> LossWeights:
    """Return the weights of the loss at `progress`, a fraction of training in [0, 1].

    During the opening phase centroid uniformity acts alone; the ramps run over the whole of training all the same.
    """
    if progress < method.opening:
        return LossWeights(nce=0.0, atp=0.0, cu=1.0)
    return LossWeights(nce=1.0, atp=ramp_value(method.atp, progress), cu=ramp_value(method.cu, progress))
