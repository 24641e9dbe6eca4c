"""A memory of embeddings from earlier steps, as negatives beyond the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MemoryBank(nn.Module):
    """The last embeddings that were pushed, first in, first out; on the module's device, part of its state.

        negatives, negative_ids = bank.negatives(), bank.ids()
        loss = info_nce(query, positive, negatives=negatives)
        bank.push(positive)

    Every process has a bank of its own; a loss with ``group=`` shows the negatives of all processes to every row.

    Args:
        capacity: how many embeddings are kept.
        dim: D.
        dtype: of the embeddings, that of those it is used with.
        with_ids: keep an id with each.

    Raises:
        ValueError: capacity or D is not positive.

    Source:
        cross-batch memory: arXiv 1912.06798; queue of negatives: arXiv 1911.05722.

    Examples:
        >>> bank = MemoryBank(capacity=4, dim=2)
        >>> bank.negatives() is None
        True
        >>> bank.push(torch.ones(3, 2)); bank.push(torch.zeros(3, 2))
        >>> bank.negatives().sum(dim=1).tolist()
        [0.0, 0.0, 2.0, 0.0]
    """

    embeddings: Tensor
    kept_ids: Tensor | None
    pushed: Tensor

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        with_ids: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("capacity", capacity), ("dim", dim)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.register_buffer("embeddings", torch.zeros(capacity, dim, dtype=dtype))
        self.register_buffer("kept_ids", torch.zeros(capacity, dtype=torch.int64) if with_ids else None)
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self._count = 0

    def __len__(self) -> int:
        """How many this process keeps now."""
        return min(self._count, self.embeddings.shape[0])

    def negatives(self) -> Tensor | None:
        """A copy of what is kept, ``[K, D]``, in no order; None while there is nothing."""
        return self.embeddings[: len(self)].clone() if len(self) else None

    def ids(self) -> Tensor | None:
        """Ids of ``negatives()``, ``[K]`` int64; None without ids, or while there is nothing."""
        return self.kept_ids[: len(self)].clone() if self.kept_ids is not None and len(self) else None

    @torch.no_grad()
    def push(self, embeddings: Tensor, ids: Tensor | None = None) -> None:
        """Remember embeddings ``[n, D]``, and their ids ``[n]``, in place of the oldest; no gradient is kept.

        Raises:
            ValueError: the shape is another, or ids are missing or superfluous.
        """
        capacity, dim = self.embeddings.shape
        if embeddings.dim() != 2 or embeddings.shape[1] != dim:
            raise ValueError(f"`embeddings` must have shape [n, {dim}], got {list(embeddings.shape)}")
        if (ids is None) != (self.kept_ids is None):
            given = "None" if ids is None else "a tensor"
            raise ValueError(f"`ids` must be given to a bank with_ids=True, and to no other; got {given}")
        if ids is not None and list(ids.shape) != [embeddings.shape[0]]:
            raise ValueError(f"`ids` must have shape [{embeddings.shape[0]}], got {list(ids.shape)}")
        count = embeddings.shape[0]
        embeddings = embeddings[-capacity:]
        place = (self._count + count - embeddings.shape[0] + torch.arange(embeddings.shape[0])) % capacity
        place = place.to(self.embeddings.device)
        self.embeddings[place] = embeddings.detach().to(self.embeddings)
        if ids is not None and self.kept_ids is not None:
            self.kept_ids[place] = ids[-capacity:].to(self.kept_ids)
        self._count += count
        self.pushed.fill_(self._count)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._count = int(self.pushed)

    def extra_repr(self) -> str:
        return f"capacity={self.embeddings.shape[0]}, dim={self.embeddings.shape[1]}, kept={len(self)}"
