"""The optimiser and its schedule, and how they come back from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gapkernels.errors import shown
from gapkernels.training.checkpoint import Checkpoint, require_like
from gapkernels.training.config import Config


def build_optimizer(
    config: Config, model: nn.Module, log_logit_scale: nn.Parameter, temperature_lr: float
) -> torch.optim.Optimizer:
    """Build the optimiser; weight decay acts on matrices only, not on biases, norms and the temperature."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if log_logit_scale.requires_grad:
        groups.append({"params": [log_logit_scale], "weight_decay": 0.0, "lr": temperature_lr * config.optim.lr})
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optim.optimizer]
    return kind(groups, lr=config.optim.lr)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters in the order in which the optimiser numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    checkpoint: Checkpoint,
    initial: Mapping[nn.Parameter, Tensor],
) -> None:
    """Bring back the moments of every parameter, and the place in the schedule.

    Args:
        optimizer: Adam or AdamW, as it was built.
        scheduler: of its learning rates.
        checkpoint: where moments and place are.
        initial: what the parameters were before the first step. One without moments has never been moved.

    Raises:
        ValueError: if a moment is missing or of another shape, or a setting or the place is another one.
    """
    own, found = optimizer.state_dict(), checkpoint.optimizer
    groups, moments = found.get("param_groups"), found.get("state")
    if not isinstance(groups, list) or not isinstance(moments, dict) or len(groups) != len(own["param_groups"]):
        raise ValueError("the optimizer has other groups of parameters")
    for group, expected in zip(groups, own["param_groups"], strict=True):
        # The learning rate moves; it follows from the schedule's place, which is compared below.
        if not isinstance(group, dict) or set(group) != set(expected):
            raise ValueError("the optimizer has other settings")
        if {**group, "lr": None} != {**expected, "lr": None}:
            raise ValueError("the optimizer has other settings")
    parameters = trained_parameters(optimizer)
    if not set(moments) <= set(range(len(parameters))):
        raise ValueError("the optimizer holds moments of other parameters")
    for number, parameter in enumerate(parameters):
        if number not in moments:
            if not parameter.requires_grad or torch.equal(parameter, initial[parameter]):
                continue
            raise ValueError(f"the optimizer holds no moments of parameter {number}, which has been trained")
        for name in ("exp_avg", "exp_avg_sq"):
            moment = moments[number].get(name) if isinstance(moments[number], dict) else None
            require_like(f"{name} of parameter {number}", moment, parameter)
        steps = moments[number].get("step")
        if set(moments[number]) != {"exp_avg", "exp_avg_sq", "step"} or not isinstance(steps, Tensor):
            raise ValueError(f"the moments of parameter {number} are not those of {type(optimizer).__name__}")
        if steps.numel() != 1 or not 0 < float(steps) <= checkpoint.step:
            raise ValueError(f"the optimizer has taken {shown(steps.tolist())} steps, the run {checkpoint.step}")
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    # Where the schedule is follows from the step alone.
    schedule = {**scheduler.state_dict(), "last_epoch": checkpoint.step, "_step_count": checkpoint.step + 1}
    rates = [
        base * factor(checkpoint.step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    if checkpoint.scheduler.get("last_epoch") != checkpoint.step or [group["lr"] for group in groups] != rates:
        raise ValueError("the learning rate is at another place of its schedule")
    scheduler.load_state_dict({**schedule, "_last_lr": rates})
