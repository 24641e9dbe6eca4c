"""The batch as several processes hold it: what the loss needs from ``torch.distributed``, and nothing more.

Every process holds ``n`` of the ``N = n·W`` rows, in rank order. A process gathers the modality that other processes'
rows are compared with, computes its own ``n×N`` blocks and sums what belongs to columns over the processes. Where that
takes too much memory, rows go around the circle of processes instead, and nobody holds more than two parts of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gapkernels.spec import Candidates, Contrast, LossSpec, contrast_numbers

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NEEDS_GRAD = "inputs that require grad (embeddings in order, the logit scale, negatives, the logit bias)"
STEP_SCALARS = ("logit scale", "nce_weight", "atp_weight", "cu_weight", "uniformity_t", "logit_bias")

MODES = ("auto", "gather", "ring")


def spec_numbers(spec: LossSpec) -> dict[str, float]:
    """The settings of a loss by the names they have in messages."""
    return {{"nce": "InfoNCE", "atp": "ATP", "cu": "CU"}.get(k, k): float(v) for k, v in spec._asdict().items()}


FUNCTIONS = ("a loss", "similarity_logsumexp", "similarity_softplus")

_UNSAID: dict[str, float] = {
    "number of rows": 0,
    "function": 0,
    "dimension D": 0,
    "number of embeddings": 0,
    "dtype": 0,
    **contrast_numbers(Contrast(), Candidates()),
    "uniformity_of_equal_ids": True,
    "reduction": 0,
    **spec_numbers(LossSpec()),
    "number of columns": 0,
    "matched": True,
    **dict.fromkeys([f"presence of {name}" for name in ("row_ids", "col_ids", "row_limit", "col_limit")], 0),
    NEEDS_GRAD: 0,
    "group_mode": 0,
    "choice between torch.compile and eager": 0,
}
"""Every name that ``agree`` may be told, and what not to be told it means. Processes exchange as many numbers in any
call, so that one which calls another function, or fails, is understood by those that wait."""


def complete(description: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a description and those it does not say, always as many and in one order.

    Raises:
        KeyError: it says something that nobody knows of.
    """
    unknown = description.keys() - _UNSAID.keys()
    if unknown:
        raise KeyError(f"{sorted(unknown)} are not among {list(_UNSAID)}")
    return {**_UNSAID, **description}


_SPELLED = {
    "function": FUNCTIONS,
    "contrast": ("'softmax'", "'sigmoid'"),
    "partition": ("'per_direction'", "'joint'"),
    "duplicates": ("'mask'", "'positive'"),
    "reduction": ("'mean'", "'none'"),
    "group_mode": tuple(map(repr, MODES)),
    "dtype": tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES),
}

_FAILED = -1.0  # in place of a number of rows: a process that could not call the loss
_SEPARATOR = ":"
_SHIFT_TAG = 64  # of what overtakes the tensors that circulate

Function = TypeVar("Function", bound=Callable[..., Any])

# Their old names warn from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class World:
    """A single process: gathering and summing over it changes nothing."""

    rank = 0
    size = 1
    mode = "gather"

    def agree(self, description: Mapping[str, float], scalars: Sequence[Tensor] = ()) -> None:
        """Raise on every process if the processes evaluate different things."""

    def gather_rows(self, x: Tensor) -> Tensor:
        """Concatenate the ``[n, ...]`` of every process to ``[N, ...]``."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def sum_own_rows(self, x: Tensor) -> Tensor:
        """Sum ``[N, ...]`` over the processes and return this process's ``[n, ...]``."""
        return x

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin ``gather_rows``; the function returned waits for it."""
        return lambda: x

    def circulate(self, tensors: list[Tensor], steps: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield ``(owner, tensors of that process)``: the own ones, then those of the following processes."""
        yield 0, tensors

    def shift(self, x: Tensor, by: int) -> Tensor:
        """Give a tensor to the process ``by`` places on, and return what this one is given."""
        return x


class ProcessGroupWorld(World):
    """The processes of one ``torch.distributed`` group."""

    _agreed: ClassVar[set[tuple[Any, ...]]] = set()
    _unread: ClassVar[dict[str, tuple[Any, Tensor, list[str]]]] = {}

    def __init__(self, group: dist.ProcessGroup, mode: str = "auto") -> None:
        self._group = group
        self.mode = mode
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def agree(self, description: Mapping[str, float], scalars: Sequence[Tensor] = ()) -> None:
        """Raise on every process if the processes evaluate different things, which would hang or be silently wrong.

        Every call exchanges a few numbers. On a GPU reading them would wait for the device: there they are looked at
        when this process describes something that it has not described before, and otherwise by the next call, when
        they have long arrived on the host.

        Args:
            description: numbers by name, of ``_UNSAID``, the first of which is always given.
            scalars: what may change from step to step, on the device of the embeddings: as many of ``STEP_SCALARS``
                as there are.

        Raises:
            ValueError: names what differs, with every process's value, or the process that could not call the loss.
        """
        _count_agreement()
        described = complete(description)
        names = [*described, *STEP_SCALARS]
        device = scalars[0].device
        numbers = torch.tensor(list(described.values()), dtype=torch.float64, device=device)
        own = torch.cat([numbers, *(s.detach().double().reshape(-1) for s in scalars)])
        own = torch.nn.functional.pad(own, (0, len(names) - own.numel()))
        everyone = self.gather_rows(own[None])
        if device.type == "cpu":
            self._compare(everyone, names)
            return
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        key = (self._group.group_name, *described.items())
        if not capturing:
            self._look_at_last()
        if key not in self._agreed and not capturing:
            self._compare(everyone.cpu(), names)
            self._agreed.add(key)
        elif device.type == "cuda" and not capturing:
            values = torch.empty(everyone.shape, dtype=everyone.dtype, pin_memory=True)
            values.copy_(everyone, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._unread[self._group.group_name] = arrived, values, names

    def _look_at_last(self) -> None:
        """Compare the numbers of the last call, if they have arrived."""
        arrived, values, names = self._unread.pop(self._group.group_name, (None, None, None))
        if arrived is not None and values is not None and names is not None and arrived.query():
            self._compare(values, names)

    def _compare(self, values: Tensor, names: list[str]) -> None:
        failed = (values[:, 0] == _FAILED).nonzero().flatten().tolist()
        if failed:
            raise ValueError(f"rank {failed[0]} of `group` could not call the loss{self._messages(values.device)}")
        rows = values[:, 0].long().tolist()
        if min(rows) != max(rows):
            raise ValueError(
                f"every process of `group` must hold the same number of rows, got {min(rows)} to {max(rows)} "
                f"(rank {self.rank} holds {rows[self.rank]}); drop the last incomplete batch "
                "(DataLoader(drop_last=True))"
            )
        for name, column in zip(names, values.T.tolist(), strict=True):
            if any(value != column[0] and not (value != value and column[0] != column[0]) for value in column):
                each = ", ".join(f"rank {rank} has {_spelled(name, value)}" for rank, value in enumerate(column))
                raise ValueError(f"every process of `group` must call the loss with the same {name}: {each}")

    def _messages(self, device: torch.device, own: str | None = None) -> str:
        if device.type != "cpu" or self._device().type != "cpu":
            return "; its own message says why"
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, own, group=self._group)
        return "".join(f": {message}" for message in messages[:] if message is not None)

    def _device(self) -> torch.device:
        return torch.device("cuda" if "nccl" in dist.get_backend(self._group) else "cpu")

    def report_failure(self, error: Exception, device: torch.device) -> None:
        """Tell the processes that wait in ``agree`` that this one will not come."""
        own = torch.zeros(len(_UNSAID) + len(STEP_SCALARS), dtype=torch.float64, device=device)
        own[0] = _FAILED
        self.gather_rows(own[None])
        self._messages(device, str(error))

    def gather_rows(self, x: Tensor) -> Tensor:
        return self.start_gather(x)()

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        work = _answered(_all_gather, out, x.contiguous(), group=self._group, async_op=True)

        def finish() -> Tensor:
            _answered(work.wait)
            return out

        return finish

    def sum(self, x: Tensor) -> Tensor:
        out = x.clone()
        _answered(dist.all_reduce, out, dist.ReduceOp.SUM, group=self._group)
        return out

    def max(self, x: Tensor) -> Tensor:
        out = x.clone()
        _answered(dist.all_reduce, out, dist.ReduceOp.MAX, group=self._group)
        return out

    def sum_own_rows(self, x: Tensor) -> Tensor:
        """Sums of bfloat16 are formed here in float32, of parts that are each rounded once, wherever they come from."""
        out = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        if x.dtype != torch.bfloat16:
            _answered(_reduce_scatter, out, x.contiguous(), dist.ReduceOp.SUM, group=self._group)
            return out
        parts = torch.empty_like(x)
        _answered(dist.all_to_all_single, parts, x.contiguous(), group=self._group)
        return parts.view(self.size, *out.shape).sum(dim=0, dtype=torch.float32)

    def circulate(self, tensors: list[Tensor], steps: int) -> Iterator[tuple[int, list[Tensor]]]:
        held = [x.contiguous() for x in tensors]
        for step in range(steps):
            on_the_way: list[Any] = []
            coming = []
            if step < steps - 1:  # travels while the caller computes with what is here
                coming = [torch.empty_like(x) for x in held]
                on_the_way = self._exchange(held, coming, -1)
            yield (self.rank + step) % self.size, held
            for work in on_the_way:
                _answered(work.wait)
            held = coming

    def shift(self, x: Tensor, by: int) -> Tensor:
        out = torch.empty_like(x)
        for work in self._exchange([x.contiguous()], [out], by, first_tag=_SHIFT_TAG):
            _answered(work.wait)
        return out

    def _exchange(self, out: list[Tensor], into: list[Tensor], by: int, first_tag: int = 0) -> list[Any]:
        """Begin to send tensors to the process ``by`` places on, and to receive from the one as many places back."""
        target, source = (dist.get_global_rank(self._group, (self.rank + k) % self.size) for k in (by, -by))
        operations = [
            operation
            for tag, (x, y) in enumerate(zip(out, into, strict=True), start=first_tag)
            for operation in (
                dist.P2POp(dist.isend, x, target, self._group, tag),
                dist.P2POp(dist.irecv, y, source, self._group, tag),
            )
        ]
        return _answered(dist.batch_isend_irecv, operations)


def _answered(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call what waits for other processes.

    Raises:
        RuntimeError: one of them has ended or does not answer in time.
    """
    try:
        return call(*arguments, **options)
    except RuntimeError as error:
        raise RuntimeError(
            "a process of `group` has ended, failed, or has not answered within the time-out of the group "
            f"({str(error).partition(chr(10))[0]}); its own message says why"
        ) from error


_agreements = [0]


def _count_agreement() -> None:
    _agreements[0] += 1


def heard_by_all(loss: Function) -> Function:
    """Let a loss that fails on this process before the processes agree tell those that wait: they fail too."""

    @functools.wraps(loss)
    def checked(*embeddings: Any, **options: Any) -> Any:
        group = options.get("group")
        if group is None or torch.compiler.is_compiling():
            return loss(*embeddings, **options)
        before = _agreements[0]
        try:
            return loss(*embeddings, **options)
        except (TypeError, ValueError) as error:
            if before == _agreements[0]:
                _report(group, embeddings, error)
            raise

    return cast(Function, checked)


def _report(group: Any, embeddings: Sequence[Any], error: Exception) -> None:
    try:
        name, size = group_name_and_size(group)
        world = world_of(name)
    except (TypeError, ValueError, RuntimeError):  # this process is not a member, or there is no such group
        return
    if size > 1 and isinstance(world, ProcessGroupWorld):
        _count_agreement()  # a function around this one need not report it again
        devices = [e.device for e in embeddings if isinstance(e, Tensor)]
        world.report_failure(error, devices[0] if devices else world._device())


def _spelled(name: str, value: float) -> str:
    if name in _SPELLED:
        return _SPELLED[name][int(value)]
    if name == "false_negative_margin" and value < 0:
        return "None"
    if name == NEEDS_GRAD:
        return str([place for place in range(int(value).bit_length()) if int(value) >> place & 1])
    return f"{value:g}" if value != int(value) else str(int(value))


def world_of(group_name: str) -> World:
    """The processes of the group that ``group_name_and_size`` has named; the empty name means this process alone."""
    if not group_name:
        return World()
    _, _, name = group_name.partition(_SEPARATOR)
    return ProcessGroupWorld(dist.distributed_c10d._resolve_process_group(name), mode_of(group_name))  # type: ignore[arg-type]


def mode_of(group_name: str) -> str:
    """How rows of other processes come here, one of ``MODES``."""
    return group_name.partition(_SEPARATOR)[0] or World.mode


def group_name_and_size(group: dist.ProcessGroup | str | None, mode: str = "auto") -> tuple[str, int]:
    """How operators name a group and its mode (the empty name is this process alone), and its number of processes.

    Args:
        group: a process group, None, or ``"world"``: all processes there are when this is called.
        mode: how rows of other processes come here, one of ``MODES``.

    Raises:
        ValueError: the text or the mode is another, or this process is not a member of the group.
        TypeError: it is nothing of that.
    """
    if mode not in MODES:
        raise ValueError(f"`group_mode` must be {', '.join(map(repr, MODES[:-1]))} or {MODES[-1]!r}, got {mode!r}")
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f"`group` must be a process group, 'world' or None, got {group!r}")
        if not (dist.is_available() and dist.is_initialized()):
            return "", 1
        group = dist.group.WORLD
    if group is None:
        return "", 1
    if isinstance(group, int):  # what torch.distributed.new_group returns to processes outside
        raise ValueError(
            f"`group` must have this process as a member: rank {dist.get_rank()} is not in it; call the loss on the "
            "processes that torch.distributed.new_group was given"
        )
    if not hasattr(group, "group_name"):
        raise TypeError(
            f"`group` must be a torch.distributed process group, 'world' or None, got {type(group).__name__}"
        )
    return f"{mode}{_SEPARATOR}{group.group_name}", dist.get_world_size(group)


def triangle_blocks(rank: int, size: int, rows: int) -> list[tuple[slice, slice]]:
    """The blocks of the upper triangle of a symmetric ``[N, N]`` matrix that one of ``size`` processes computes.

    The triangle is dealt out evenly and each unordered pair of rows is in exactly one block of one process: process r
    takes its own diagonal block (rows equal columns: only the part above the diagonal counts) and the blocks
    (r, r+1), (r, r+2), … half way around the circle of processes. With an even number of processes the opposite
    block belongs to two of them; each takes half of it.

    Args:
        rank: this process, 0 ≤ rank < size.
        size: number of processes W.
        rows: rows per process n = N/W.

    Returns:
        ``(row slice, column slice)`` pairs into ``[0, N)``; the first is the diagonal block.
    """

    def shard(r: int, start: int = 0, stop: int = rows) -> slice:
        return slice(r % size * rows + start, r % size * rows + stop)

    blocks = [(shard(rank), shard(rank))]
    blocks += [(shard(rank), shard(rank + k)) for k in range(1, (size + 1) // 2)]
    if size % 2 == 0:
        opposite = rank + size // 2
        if rank < size // 2:
            blocks.append((shard(rank, 0, rows // 2), shard(opposite)))
        else:
            blocks.append((shard(rank), shard(opposite, rows // 2, rows)))
    return blocks
