"""Measure without pytest: where nothing can be installed, and where a case may take the process down with it.

    python -m benchmarks.run --out results.json --suites peers,scaling

The file is written before and after every case, so whatever ends the process (a crash, a hang, `timeout`) costs one
case; the same command with --resume goes on behind it.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, results
from benchmarks.cases import Case
from benchmarks.harness import Session, Skipped, with_turns
from benchmarks.implementations import groups
from benchmarks.timing import Clock, Samples, sample

_LOST_CONTEXT = re.compile(r"CUDA (driver )?error|Triton Error \[CUDA\]")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file; written after every row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--suites", default="", help="comma-separated; all by default")
    parser.add_argument("--select", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--setting", default="", help="names the environment variables set, in the results")
    parser.add_argument("--case-seconds", type=float, default=5.0, help="about how long to repeat one case, each turn")
    parser.add_argument("--call-seconds", type=float, default=60.0, help="leave out calls that take longer")
    parser.add_argument("--hang-seconds", type=float, default=0.0, help="end the process if one case takes longer")
    parser.add_argument("--patience", type=int, default=0, help="repeat calls that other processes disturbed")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--turns", type=int, default=1, help="of each implementation of a problem, in alternation")
    parser.add_argument("--resume", action="store_true", help="go on with the cases that the result file lacks")
    parser.add_argument("--slow", action="store_true", help="include cases that take minutes")
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that measure memory
    table = cases.table_of(device.type)
    suites = options.suites.split(",") if options.suites else list(table)
    table = {**table, **cases.ON_REQUEST[device.type]}
    unknown = [suite for suite in suites if suite not in table]
    if unknown:
        parser.error(f"unknown suite {', '.join(unknown)}; there are {', '.join(table)}")
    session = Session(
        device,
        case_seconds=options.case_seconds,
        call_seconds=options.call_seconds,
        setting=options.setting,
        patience=options.patience,
    )
    rows: list[dict[str, Any]] = []
    if options.resume and options.out.exists():
        rows, session.skipped = results.read(options.out)
        for row in rows:
            session.remember(row)
    done = set(map(results.identity, [*rows, *session.skipped]))

    problems: dict[str, list[Case]] = {}
    for case in cases.cases(suites, table, groups(device)):
        known = results.identity(session.describe(case)) in done
        if not known and re.search(options.select, case.id) and (options.slow or not case.slow):
            # What takes no turns is measured in the order of the suites: time may end anywhere.
            problems.setdefault(case.problem if options.turns > 1 else case.id, []).append(case)
    for problem in problems.values():
        turns = Turns(session, options.turns)
        for case in problem:
            _measure(session, case, turns, rows, options)
            if session.skipped and _LOST_CONTEXT.search(session.skipped[-1]["reason"]):
                return 1  # after such an error nothing works in this process any more
        if options.turns > 1 and turns.rows:
            rows[len(rows) - len(turns.rows) :] = turns.take()
            results.write(options.out, results.document(rows, session.skipped))
            for row in turns.rows:
                print(f"{'in turns':52} {row['label']:36} {_said(row)}", flush=True)
    return 0


class Turns:
    """Times the implementations of one problem, and the yardstick, in turns.

    The clock of a shared machine moves within minutes: between what was timed one after another only part of the
    difference is the implementations'.

    Args:
        session: what measures.
        count: turns of each implementation; the first is that of its own measurement, without the yardstick.
    """

    def __init__(self, session: Session, count: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._session, self._count = session, count
        self._timed: list[tuple[Callable[[], Samples], list[Samples]]] = []

    def measure(self, case: Case) -> dict[str, Any]:
        """The row of the first turn; raises ``Skipped`` as ``Session.measure`` does, and then there are no others."""
        if self._count == 1:
            return self._session.measure(case)
        timed: list[tuple[Callable[[], Samples], list[Samples]]] = []

        def sampler(call: Callable[[], object], prepare: Callable[[], None], clock: Clock, rounds: int) -> Samples:
            def turn() -> Samples:
                sample(call, prepare, clock, 1)  # back into the caches
                return sample(call, prepare, clock, rounds, self._session.patience)

            first = turn()
            timed.append((turn, [first]))
            return first

        row = self._session.measure(case, sampler)
        self.rows.append(row)
        self._timed += timed
        return row

    def take(self) -> list[dict[str, Any]]:
        """The rows, in the order of their measurement, after the turns that are left."""
        matmul = []
        for _ in range(self._count - 1):
            matmul.append(self._session.measure_matmul())
            for turn, taken in self._timed:
                taken.append(turn())
        self.rows = [with_turns(row, taken, matmul) for row, (_, taken) in zip(self.rows, self._timed, strict=True)]
        return self.rows


def _said(row: dict[str, Any]) -> str:
    said = f"{row['median'] * 1e3:10.3f} ms  {row['tflops']:8.3f} TFLOP/s  {row['utilisation']:6.2f} of matmul"
    if row["back_to_back"] is not None:
        said += f"  ({row['back_to_back'] * 1e3:.3f} ms back to back)"
    return said


def _measure(
    session: Session, case: Case, turns: Turns, rows: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Measure one case and write the file, in which the case counts as hung until it is through."""
    unanswered = session.describe_skip(case, Skipped("hung", "the process ended before it gave an answer"))
    results.write(options.out, results.document(rows, [*session.skipped, unanswered]))
    if options.hang_seconds:
        faulthandler.dump_traceback_later(options.hang_seconds, exit=True)
    try:
        row = turns.measure(case)
        rows.append(row)
        said = _said(row)
    except Skipped as skipped:
        said = str(skipped)
    finally:
        faulthandler.cancel_dump_traceback_later()
        results.write(options.out, results.document(rows, session.skipped))
    print(f"{case.problem:52} {session.describe(case)['label']:36} {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
