"""The time model of many GPUs: the page shows what it computes, and its counts are those of the code."""

from pathlib import Path

import pytest

from benchmarks import scaling

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def between(name: str) -> str:
    return PAGE.split(f"<!-- {name}:begin -->\n")[1].split(f"<!-- {name}:end -->")[0]


def test_the_page_shows_the_tables() -> None:
    assert between("scaling") == scaling.tables()
    results = ROOT / "benchmarks" / "results" / "cpu-intel-xeon-amx-2-threads-2026-11-27.json"
    assert between("check") == scaling.check([results])


def test_one_process_computes_and_sends_nothing() -> None:
    machine = scaling.Machine()
    cost = scaling.gather(4096, 512, 1, machine)
    assert cost.operations == 8 * 4096**2 * 512
    assert cost.sent == 0
    assert cost.seconds == pytest.approx(cost.operations / (989e12 * 0.6))


def test_work_is_shared_and_a_ring_needs_memory_for_its_own_rows_only() -> None:
    machine = scaling.Machine()
    for method in scaling.METHODS.values():
        few, many = (method(2**20, 512, processes, machine) for processes in (8, 64))
        assert few.operations == 8 * many.operations
    assert scaling.ring(2**20, 512, 64, machine).memory * 8 == scaling.ring(2**20, 512, 8, machine).memory
    assert scaling.gather(2**20, 512, 64, machine).memory == scaling.gather(2**20, 512, 8, machine).memory


def test_the_largest_batch_fits_and_its_double_does_not() -> None:
    machine = scaling.Machine()
    for name, method in scaling.METHODS.items():
        size = scaling.largest_batch(name, 64, machine)
        assert method(size, 512, 64, machine).memory <= machine.memory < method(2 * size, 512, 64, machine).memory


def test_the_command_prints_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main([])
    assert capsys.readouterr().out == scaling.tables()
