"""What a run writes while it trains: one line of JSON for each record, TensorBoard's log, a progress bar."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gapkernels.errors import UserError
from gapkernels.training.layout import METRICS, TENSORBOARD

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm


class RunLog:
    """The log of a run on the process that writes it; every method does nothing on the others.

    Args:
        metrics: the records, None on a process that writes nothing.
        board: TensorBoard's log, likewise.
        bar: the progress bar, likewise.
    """

    def __init__(
        self, metrics: MetricLog | None = None, board: SummaryWriter | None = None, bar: tqdm[Any] | None = None
    ) -> None:
        self._metrics, self._board, self._bar = metrics, board, bar

    def record(self, split: str, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Keep what was measured on a split."""
        if self._metrics is None or self._board is None:
            return
        self._metrics.append({"split": split, "step": step, "epoch": epoch, **values})
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def advance(self, logged: Mapping[str, float]) -> None:
        """Move the bar by a step, and show what was logged of it."""
        if self._bar is None:
            return
        self._bar.update()
        if logged:
            self._bar.set_postfix(loss=f"{logged['loss']:.3f}", gap=f"{logged['modality_gap']:.3f}")

    def sync(self) -> tuple[int, str]:
        """Bring every record to the disk and return the size and the checksum of the file of records."""
        if self._metrics is None or self._board is None:
            return 0, ""
        self._board.flush()
        return self._metrics.sync()


@contextmanager
def open_log(folder: Path, label: str, step: int, total_steps: int, size: int, digest: str | None) -> Iterator[RunLog]:
    """Open the log of a run, to go on behind its checkpoint.

    Args:
        folder: of the run.
        label: what the bar calls it.
        step: where the run stands.
        total_steps: where it ends.
        size: of what the checkpoint knows of the records, in bytes.
        digest: checksum of these bytes; None where there is no checkpoint.
    """
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    with (
        MetricLog(folder / METRICS, size, digest) as metrics,
        SummaryWriter(folder / TENSORBOARD, purge_step=0 if digest is None else step + 1) as board,
        tqdm(total=total_steps, initial=step, desc=label, unit="step", leave=False, disable=None) as bar,
    ):
        yield RunLog(metrics, board, bar)


class MetricLog:
    """One JSON object per line, cut back to `size` bytes first: what came after the checkpoint is computed again.

    Args:
        path: the file.
        size: of what the checkpoint knows of it, in bytes.
        digest: checksum of these bytes; None where there is no checkpoint.
    """

    def __init__(self, path: Path, size: int, digest: str | None) -> None:
        self._file = path.open("a+b")
        self._file.seek(0)
        known = self._file.read(size)
        self._digest = hashlib.sha256(known)
        if len(known) < size or (digest is not None and self._digest.hexdigest() != digest):
            self._file.close()
            what = "is shorter than its checkpoint says" if len(known) < size else "is not the log of its checkpoint"
            raise UserError(f"{path} {what}; delete the folder {path.parent} to redo this run")
        self._file.truncate(size)
        self._file.seek(size)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        self._digest.update(line)
        self._file.write(line)
        self._file.flush()

    def sync(self) -> tuple[int, str]:
        """Bring every record to the disk and return the size and the checksum of the file."""
        os.fsync(self._file.fileno())
        return self._file.tell(), self._digest.hexdigest()
