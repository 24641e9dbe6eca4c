"""The suites; their cases are in ``benchmarks.cases``.

python -m pytest benchmarks --benchmark-json=results.json -k "peers and not compile"
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.harness import Session, Skipped
from benchmarks.timing import Clock, CpuUse, Samples


def test_speed(case: Case, session: Session, benchmark: BenchmarkFixture) -> None:
    """Measure a case with pytest-benchmark taking the times."""

    def sampler(call: Callable[[], object], prepare: Callable[[], None], clock: Clock, rounds: int) -> Samples:
        before = CpuUse.now()
        benchmark.pedantic(call, setup=prepare, rounds=rounds)
        assert benchmark.stats is not None
        use = CpuUse.now() - before
        return Samples(benchmark.stats.stats.data, use.own / use.wall / use.cores, use.others)

    benchmark.group = case.problem
    try:
        benchmark.extra_info.update(session.measure(case, sampler))
    except Skipped as skipped:
        pytest.skip(str(skipped))
