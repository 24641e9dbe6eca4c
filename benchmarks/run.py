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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, results
from benchmarks.cases import Case
from benchmarks.harness import Session, Skipped
from benchmarks.implementations import groups

_LOST_CONTEXT = re.compile(r"CUDA (driver )?error|Triton Error \[CUDA\]")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file; written after every row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--suites", default="", help="comma-separated; all by default")
    parser.add_argument("--select", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--setting", default="", help="names the environment variables set, in the results")
    parser.add_argument("--case-seconds", type=float, default=5.0, help="about how long to repeat one case")
    parser.add_argument("--call-seconds", type=float, default=60.0, help="leave out calls that take longer")
    parser.add_argument("--hang-seconds", type=float, default=0.0, help="end the process if one case takes longer")
    parser.add_argument("--patience", type=int, default=0, help="repeat calls that other processes disturbed")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
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

    for case in cases.cases(suites, table, groups(device)):
        known = results.identity(session.describe(case)) in done
        if known or not re.search(options.select, case.id) or (case.slow and not options.slow):
            continue
        _measure(session, case, rows, options)
        if session.skipped and _LOST_CONTEXT.search(session.skipped[-1]["reason"]):
            return 1  # after such an error nothing works in this process any more
    return 0


def _measure(session: Session, case: Case, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Measure one case and write the file, in which the case counts as hung until it is through."""
    unanswered = session.describe_skip(case, Skipped("hung", "the process ended before it gave an answer"))
    results.write(options.out, results.document(rows, [*session.skipped, unanswered]))
    if options.hang_seconds:
        faulthandler.dump_traceback_later(options.hang_seconds, exit=True)
    try:
        row = session.measure(case)
        rows.append(row)
        said = f"{row['median'] * 1e3:10.3f} ms  {row['tflops']:8.3f} TFLOP/s  {row['utilisation']:6.2f} of matmul"
        if row["back_to_back"] is not None:
            said += f"  ({row['back_to_back'] * 1e3:.3f} ms back to back)"
    except Skipped as skipped:
        said = str(skipped)
    finally:
        faulthandler.cancel_dump_traceback_later()
        results.write(options.out, results.document(rows, session.skipped))
    print(f"{case.problem:52} {session.describe(case)['label']:36} {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
