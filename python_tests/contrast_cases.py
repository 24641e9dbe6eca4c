"""Every option of the contrast alone, and the combinations that meet in one formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CASES: list[dict[str, Any]] = [
    {"directions": "from_anchor"},
    {"directions": "to_anchor"},
    {"directions": (0.2, 0.9)},
    {"same_side": True},
    {"same_side": "anchor"},
    {"same_side": "other", "directions": (0.0, 2.0)},
    {"partition": "joint"},
    {"partition": "joint", "same_side": True},
    {"partition": "joint", "same_side": "anchor", "directions": "from_anchor", "decoupled": True},
    {"decoupled": True},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "negatives": "shared"},
    {"label_smoothing": 0.1, "negatives": "own", "directions": "from_anchor"},
    {"ids": True},
    {"ids": True, "same_side": True},
    {"ids": True, "duplicates": "positive"},
    {"ids": True, "duplicates": "positive", "decoupled": True, "same_side": True},
    {"ids": True, "duplicates": "positive", "label_smoothing": 0.2, "directions": "from_anchor"},
    {"ids": True, "uniformity_of_equal_ids": False},
    {"false_negative_margin": 0.05},
    {"false_negative_margin": 0.02, "ids": True, "same_side": True},
    {"negatives": "shared"},
    {"negatives": "own"},
    {"negatives": "shared", "ids": True, "negative_ids": True},
    {"negatives": "own", "false_negative_margin": 0.1},
    {"negatives": "shared", "false_negative_margin": 0.1, "same_side": True, "partition": "joint"},
    {"contrast": "sigmoid"},
    {"contrast": "sigmoid", "ids": True},
    {"contrast": "sigmoid", "ids": True, "duplicates": "positive"},
    {"contrast": "sigmoid", "negatives": "shared"},
    {"contrast": "sigmoid", "negatives": "own"},
    {"contrast": "sigmoid", "negatives": "shared", "ids": True, "negative_ids": True},
]

NUM_NEGATIVES = 6


def name_of(case: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in case.items())


def tensors_of(case: dict[str, Any], like: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The tensors that a case names, for embeddings ``[N, D]``; negatives require gradient, as does the bias."""
    rows, dim = like.shape
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> Tensor:
        return torch.randint(0, max(2, rows // 3), (count,), generator=generator).to(like.device)

    found: dict[str, Tensor] = {}
    if "ids" in case:
        found["ids"] = ids(rows)
    if "negative_ids" in case:
        found["negative_ids"] = ids(NUM_NEGATIVES)
    if "negatives" in case:
        shape = (NUM_NEGATIVES, dim) if case["negatives"] == "shared" else (rows, NUM_NEGATIVES, dim)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        found["negatives"] = values.to(like.dtype).to(like.device).requires_grad_()
    if case.get("contrast") == "sigmoid":
        found["logit_bias"] = torch.tensor(-2.0, dtype=torch.float64, device=like.device, requires_grad=True)
    return found
