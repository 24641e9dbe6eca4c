"""Measure without pytest: for machines where nothing can be installed, and for runs with a time budget.

python -m benchmarks.run --out results.json --suites peers,scaling --budget 600
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, results
from benchmarks.cases import Case
from benchmarks.harness import Session, Skipped
from benchmarks.implementations import IMPLEMENTATIONS, our_backends
from benchmarks.processes import child_command

_LOST_CONTEXT = re.compile(r"CUDA (driver )?error|Triton Error \[CUDA\]")
_DISTURBING_SHARE = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file; written after every row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--suites", default="", help="comma-separated; all by default")
    parser.add_argument("--select", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is started")
    parser.add_argument("--case-seconds", type=float, default=5.0, help="about how long to repeat one case")
    parser.add_argument("--call-seconds", type=float, default=60.0, help="leave out calls that take longer")
    parser.add_argument(
        "--hang-seconds",
        type=float,
        default=float("inf"),
        help="a case that takes longer in all has hung: go on behind it in a fresh process",
    )
    parser.add_argument(
        "--wait-seconds", type=float, default=0.0, help="wait this long for other processes to calm down"
    )
    parser.add_argument("--patience", type=int, default=0, help="repeat calls that other processes disturbed")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time instead of time; with --threads 1")
    parser.add_argument("--resume", action="store_true", help="go on with the cases that the result file lacks")
    parser.add_argument(
        "--redo-disturbed",
        action="store_true",
        help="with --resume: time those again that others disturbed, keep the best",
    )
    parser.add_argument("--slow", action="store_true", help="include cases that take minutes")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)

    started = time.monotonic()
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that measure memory
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time is the duration of a call with one thread only: add --threads 1")
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
        wait_seconds=options.wait_seconds,
        patience=options.patience,
        cpu_time=options.cpu_time,
    )
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if options.resume and options.out.exists():
        earlier, session.skipped = results.read(options.out)
        rows = {results.identity(row): row for row in earlier}
        for row in earlier:
            session.remember(row)
    failed = {results.identity(entry) for entry in session.skipped}

    def save() -> None:
        results.write(options.out, results.document(list(rows.values()), session.skipped))

    def go_on_afresh() -> None:
        """Replace this process by one that goes on behind the last case, whatever state the device is in."""
        rest = ["--resume", "--budget", str(options.budget - (time.monotonic() - started))]
        os.execv(sys.executable, [*child_command("benchmarks.run", *given), *rest])

    def leave_behind(case: Case) -> None:
        hung = Skipped("hung", f"no answer within {options.hang_seconds:.0f} s")
        session.give_up(case, hung)
        print(f"{case.problem:52} {IMPLEMENTATIONS[case.implementation].label:36} {hung}", flush=True)
        save()
        go_on_afresh()

    for case in cases.cases(suites, table, our_backends(device)):
        if not re.search(options.select, case.id) or (case.slow and not options.slow):
            continue
        identity = results.identity(asdict(case))
        known = rows.get(identity)
        redo = known is not None and options.redo_disturbed and known["other_cpu_share"] > _DISTURBING_SHARE
        if identity in failed or (known is not None and not redo):
            continue
        if time.monotonic() - started > options.budget:
            reason = f"the run's budget of {options.budget:.0f} s was spent"
            print(f"stopped before {case.id}: {reason}", flush=True)
            break
        try:
            with _watched(options.hang_seconds, functools.partial(leave_behind, case)):
                row = session.measure(case, known=known)
        except Skipped as skipped:
            print(f"{case.problem:52} {IMPLEMENTATIONS[case.implementation].label:36} {skipped}", flush=True)
        else:
            if known is None or row["other_cpu_share"] <= known["other_cpu_share"]:
                rows[identity] = row
            print(
                f"{case.problem:52} {row['label']:36} {row['median'] * 1e3:10.3f} ms  "
                f"{row['tflops']:8.3f} TFLOP/s  {row['utilisation']:6.2f} of matmul  "
                f"({row['other_cpu_share']:.0%} of the CPU taken by others)",
                flush=True,
            )
        save()
        if session.skipped and _LOST_CONTEXT.search(session.skipped[-1]["reason"]):
            go_on_afresh()  # after such an error nothing works in this process any more


@contextlib.contextmanager
def _watched(seconds: float, expired: Callable[[], None]) -> Iterator[None]:
    """Call something from another thread if the block takes too long; one that waits for a device cannot be stopped."""
    if seconds == float("inf"):
        yield
        return
    timer = threading.Timer(seconds, expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


if __name__ == "__main__":
    main()
