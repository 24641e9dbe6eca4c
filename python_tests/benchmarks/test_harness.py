"""What a row carries, what happens to a case that cannot run, and whether the measure of memory can be trusted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import harness, memory, oracle, results, run
from benchmarks.cases import CPU as CPU_TABLE
from benchmarks.cases import Case, Grid
from benchmarks.harness import Session, Skipped
from benchmarks.implementations import our_backends
from benchmarks.timing import CpuUse, Samples, sample

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
linux_only = pytest.mark.skipif(not memory.available(), reason="peak memory on a CPU is measured on Linux only")


@pytest.fixture
def session() -> Session:
    return Session(CPU, case_seconds=0.05, matmul_size=256)


@linux_only
def test_row(session: Session) -> None:
    case = Case("gapkernels-torch", samples=300, width=32)
    row = session.measure(case)
    assert row["median"] > 0
    assert row["iqr"] >= 0
    assert row["rounds"] >= 3
    assert row["device"]
    assert {"python", "torch", "gapkernels"} <= set(row["versions"])
    assert row["commit"]
    assert row["tflops"] == pytest.approx(case.operations() / row["median"] / 1e12)
    assert row["utilisation"] == pytest.approx(row["tflops"] / row["matmul_tflops"])
    assert row["loss_error"] < 1e-5
    assert row["gradient_error"] < 1e-5
    assert row["gradient_bytes"] == 2 * 300 * 32 * 4
    assert row["peak_extra_bytes"] > row["gradient_bytes"]
    json.dumps(row, allow_nan=False)


@linux_only
def test_peak_memory_of_a_known_allocation() -> None:
    """Twice: what the first call freed must not hide what the second one takes."""
    script = """
import torch
from benchmarks.memory import peak_extra_bytes
for mebibytes in (1, 40, 200):
    call = lambda: torch.ones(mebibytes * 2**18).sum()
    call()
    print(mebibytes, peak_extra_bytes(call), peak_extra_bytes(call))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **memory._ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        mebibytes, *peaks = map(int, line.split())
        assert peaks == pytest.approx([mebibytes * 2**20] * 2, rel=0.02, abs=2**18)


@linux_only
def test_out_of_memory_is_a_result_and_larger_cases_are_not_tried(session: Session) -> None:
    session.memory_limit = 2**30
    with pytest.raises(Skipped, match=r"out of memory \(limit 1.0 GiB\)"):
        session.measure(Case("authors", samples=16384, width=8))
    with pytest.raises(Skipped, match="at N = 16384 already"):
        session.measure(Case("authors", samples=32768, width=8))
    assert [entry["kind"] for entry in session.skipped] == ["memory", "memory"]
    assert [entry["samples"] for entry in session.skipped] == [16384, 32768]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("no"), False),
    ],
)
def test_errors_that_mean_out_of_memory(error: Exception, expected: bool) -> None:
    assert memory.is_out_of_memory(error) is expected


def test_missing_and_failing_peers_are_results(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_, **__: 0)
    with pytest.raises(Skipped, match=r"not installed|NVIDIA"):
        session.measure(Case("inf-cl", "info_nce", samples=64))

    def fail(case: Case) -> None:
        raise RuntimeError("not implemented for 'Half'")

    failing = replace(harness.IMPLEMENTATIONS["authors"], build=lambda case: fail)
    monkeypatch.setitem(harness.IMPLEMENTATIONS, "authors", failing)
    with pytest.raises(Skipped, match="RuntimeError: not implemented for 'Half'"):
        session.measure(Case("authors", samples=64, dtype="float16"))
    assert [entry["kind"] for entry in session.skipped] == ["missing", "unsupported"]


def test_calls_expected_to_take_too_long_are_left_out(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_, **__: 0)
    session.measure(Case("matmul", samples=256, width=8))
    session.call_seconds = 1e-9
    with pytest.raises(Skipped, match="a call would take about"):
        session.measure(Case("matmul", samples=512, width=8))


def test_a_large_case_that_was_measured_early_is_what_later_ones_are_judged_by(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_, **__: 0)
    for samples in (256, 64):
        session.measure(Case("matmul", samples=samples, width=8))
    assert [samples for samples, _ in session._last_call.values()] == [256]


def test_who_gives_no_answer_twice_is_not_asked_again(session: Session) -> None:
    for samples in (64, 128):
        session.give_up(Case("matmul", samples=samples, width=8), Skipped("hung", "no answer within 1 s"))
    with pytest.raises(Skipped, match="not tried: 2 other cases gave no answer"):
        session.measure(Case("matmul", samples=32, width=8))
    assert session.skipped[-1]["samples"] == 32


@pytest.mark.parametrize("end", ["os.abort()", "time.sleep(60)"], ids=["crash", "hang"])
def test_a_run_goes_on_behind_the_case_that_ended_it(end: str, tmp_path: Path) -> None:
    program = tmp_path / "run_tiny.py"
    program.write_text(f"""
import os, sys, time
from benchmarks import cases, run
cases.CPU["tiny"] = [cases.Grid(("matmul", "authors"), samples=(64,))]
def measure(self, case, *_):
    if case.implementation == "matmul":
        {end}
    raise run.Skipped("unsupported", "reached")
run.Session._measure = measure
sys.exit(run.main())
""")
    out = tmp_path / "results.json"
    command = [sys.executable, str(program), "--out", str(out), "--device", "cpu", "--suites", "tiny", "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = [subprocess.run([*command, "--hang-seconds", "1"], env=environment, capture_output=True) for _ in range(2)]
    assert [entry.returncode == 0 for entry in done] == [False, True]
    found = [(entry["implementation"], entry["kind"], entry["reason"]) for entry in results.read(out)[1]]
    ended = "the process ended before it gave an answer"
    assert found == [("matmul", "hung", ended), ("authors", "unsupported", "reached")]


def test_a_run_interrupted_in_a_case_does_not_count_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(CPU_TABLE, "tiny", [Grid(("matmul",), samples=(64,))])
    monkeypatch.setattr(Session, "_measure", interrupt)
    out = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        run.main(["--out", str(out), "--device", "cpu", "--suites", "tiny"])
    assert results.read(out) == ([], [])


def test_a_device_that_an_error_left_unusable_is_no_second_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise Skipped("unsupported", "RuntimeError: CUDA error: an illegal memory access was encountered")

    def fail_again() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Session, "_measure", fail)
    monkeypatch.setattr(torch.cuda, "empty_cache", fail_again)
    session = Session(torch.device("cuda"))
    with pytest.raises(Skipped) as skipped:
        session.measure(Case("matmul", samples=32, width=8))
    assert session.skipped[0]["reason"] == skipped.value.reason


@pytest.mark.parametrize(
    ("reason", "lost"),
    [
        ("RuntimeError: CUDA error: an illegal memory access was encountered", True),
        ("RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("OutOfResources: out of resource: shared memory, Required: 300000", False),
    ],
)
def test_errors_after_which_a_process_is_of_no_use(reason: str, lost: bool) -> None:
    assert bool(run._LOST_CONTEXT.search(reason)) is lost


def test_the_exact_result_is_computed_once_for_all_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(CPU, case_seconds=0.01, matmul_size=64)
    monkeypatch.setattr(memory, "measure", lambda *_, **__: 0)
    computed: list[int] = []
    exact = oracle.loss_and_gradients

    def counted(inputs: list[torch.Tensor], *options: object) -> tuple[float, list[torch.Tensor]]:
        computed.append(len(inputs[0]))
        return exact(inputs, *options)

    monkeypatch.setattr(oracle, "loss_and_gradients", counted)
    for name in ("matmul", "authors"):
        for samples in (32, 64):
            assert session.measure(Case(name, samples=samples, width=8))["gradient_error"] < 1e-5
    assert computed == [32, 64]
    monkeypatch.setattr(harness, "_EXACT_BYTES", 1)
    session.measure(Case("matmul", samples=96, width=8))
    assert [case.samples for case in session._exact] == [96]


def test_samples_are_prepared_for() -> None:
    events: list[str] = []
    ticks = iter([0.0, 2.0, 5.0, 9.0])

    def clock() -> float:
        events.append("clock")
        return next(ticks)

    call, prepare = lambda: events.append("call"), lambda: events.append("prepare")
    times = sample(call, prepare, clock, rounds=2).seconds
    assert times == [2.0, 4.0]
    assert events == ["prepare", "clock", "call", "clock"] * 2


def test_disturbed_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each second of two cores, others take nothing, all, half, nothing."""
    others = iter([0.0, 2.0, 1.0, 0.0])
    now = CpuUse(0.0, 0.0, 0.0, 2)
    readings = [now]
    for share in others:
        end = CpuUse(now.wall + 1, now.own + 1, now.all + 1 + share, 2)
        readings += [end, end]
        now = end
    source = iter(readings)
    monkeypatch.setattr(CpuUse, "now", lambda: next(source))
    ticks = iter(range(100))
    samples = sample(lambda: None, lambda: None, lambda: next(ticks), 2, patience=3)
    assert samples == Samples([1, 1], cpu_share=0.5, other_cpu_share=0.0, discarded=2)


def test_steps_back_to_back_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU's clock, which is read around all of them; on a CPU there is no such figure."""
    session = Session(torch.device("cuda"), matmul_size=64)
    events: list[str] = []
    ticks = iter([0.0, 8.0, 10.0, 14.0, 20.0, 32.0])

    def clock() -> float:
        events.append("clock")
        return next(ticks)

    monkeypatch.setattr(harness, "clock_of", lambda device: clock)
    monkeypatch.setattr(harness, "step", lambda *_: events.append("step"))
    case = Case("matmul", samples=4, width=2)
    assert session._back_to_back(case, lambda z: z[0].sum(), [], steps=4) == 2.0
    assert events == ["clock", *["step"] * 4, "clock"] * 3
    assert Session(CPU)._back_to_back(case, lambda z: z[0].sum(), [], steps=4) is None


def test_relative_error() -> None:
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    off = [torch.tensor([3.0, 0.5]), torch.tensor([4.0])]
    assert oracle.relative_error(off, [e.double() for e in exact]) == pytest.approx(0.1)


def test_run_without_pytest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_, **__: 12345)
    monkeypatch.setitem(CPU_TABLE, "tiny", [Grid(("gapkernels", "siglip-kernel"), ("info_nce",), (8,), samples=(64,))])
    monkeypatch.setitem(harness._MATMUL_SIZE, "cpu", 256)
    out = tmp_path / "results.json"
    run.main(["--out", str(out), "--device", "cpu", "--suites", "tiny", "--case-seconds", "0.01"])
    content = json.loads(out.read_text())
    assert [entry["extra_info"]["implementation"] for entry in content["benchmarks"]] == our_backends(CPU)
    assert content["benchmarks"][0]["extra_info"]["back_to_back"] is None
    assert [entry["implementation"] for entry in content["skipped"]] == ["siglip-kernel"]
    assert math.isfinite(content["benchmarks"][0]["stats"]["median"])

    monkeypatch.setattr(Session, "measure", lambda *_: pytest.fail("measured again"))
    run.main(["--out", str(out), "--device", "cpu", "--suites", "tiny", "--resume"])
    assert json.loads(out.read_text())["benchmarks"] == content["benchmarks"]


def test_a_setting_is_named_beside_the_implementation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_, **__: 0)
    monkeypatch.setitem(CPU_TABLE, "tiny", [Grid(("matmul", "inf-cl"), ("info_nce",), (8,), samples=(64,))])
    monkeypatch.setitem(harness._MATMUL_SIZE, "cpu", 64)
    out = tmp_path / "results.json"
    options = ["--out", str(out), "--device", "cpu", "--suites", "tiny", "--case-seconds", "0.01", "--resume"]
    for setting in ("", "mine", "mine"):
        run.main([*options, "--setting", setting])
    rows, skipped = results.read(out)
    names = [(row["implementation"], row["label"]) for row in rows]
    assert names == [("matmul", "matmul form"), ("matmul:mine", "matmul form, mine")]
    assert [entry["implementation"] for entry in skipped] == ["inf-cl", "inf-cl:mine"]


def test_unknown_suite_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run.main(["--out", str(tmp_path / "x.json"), "--suites", "speeed"])
    assert "unknown suite speeed; there are peers" in capsys.readouterr().err


def test_implementations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls of a turn come before those of the next implementation's, and the row is that of all turns."""
    session = Session(CPU, case_seconds=0.01, matmul_size=64)
    turns, order = run.Turns(session, 3), []
    cases = [Case(name, samples=16, width=8) for name in ("matmul", "gapkernels-torch")]
    firsts = [turns.measure(case) for case in cases]
    monkeypatch.setattr(run, "sample", lambda call, *rest: order.append((call, rest[2])) or Samples([0.5], 1.0, 0.0))
    rates = iter([4.0, 2.0])
    monkeypatch.setattr(session, "measure_matmul", lambda: order.append((None, 0)) or {"matmul": next(rates) * 1e12})
    rows = turns.take()
    assert [call is None for call, rounds in order if rounds != 1] == [True, False, False] * 2
    calls = [call for call, rounds in order if rounds > 1]
    assert calls == [calls[0], calls[1]] * 2
    assert calls[0] is not calls[1]
    for first, row in zip(firsts, rows, strict=True):
        assert row["implementation"] == first["implementation"]
        assert row["turns"] == 3
        assert row["rounds"] == first["rounds"] + 2
        assert row["tflops"] == pytest.approx(row["operations"] / row["median"] / 1e12)
        assert row["utilisation"] == pytest.approx(row["tflops"] / row["matmul_tflops"])
        assert row["matmul_tflops"] == 3.0


def test_only_rows_without_turns_share_a_yardstick() -> None:
    rows = [
        {"tflops": 1.0, "utilisation": 0.5, "matmul_tflops": rate, "onednn_tflops": None} for rate in (2.0, 4.0, 8.0)
    ]
    rows[2]["turns"] = 3
    results.share_yardstick(rows)
    assert [row["matmul_tflops"] for row in rows] == [4.0, 4.0, 8.0]
    assert [row["utilisation"] for row in rows] == [0.25, 0.25, 0.5]
