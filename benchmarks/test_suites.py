"""The suites; their cases are in :mod:`benchmarks.cases`.

python -m pytest benchmarks --benchmark-json=results.json -k "peers and not compile"
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.harness import Clock, CpuUse, Samples, Session, Skipped


def run(case: Case, session: Session, benchmark: BenchmarkFixture) -> None:
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


def test_targets(case: Case, session: Session, benchmark: BenchmarkFixture) -> None:
    run(case, session, benchmark)


def test_peers(case: Case, session: Session, benchmark: BenchmarkFixture) -> None:
    run(case, session, benchmark)


def test_scaling(case: Case, session: Session, benchmark: BenchmarkFixture) -> None:
    run(case, session, benchmark)


def test_width(case: Case, session: Session, benchmark: BenchmarkFixture) -> None:
    run(case, session, benchmark)


def test_types(case: Case, session: Session, benchmark: BenchmarkFixture) -> None:
    run(case, session, benchmark)


def test_modalities(case: Case, session: Session, benchmark: BenchmarkFixture) -> None:
    run(case, session, benchmark)


def test_large(case: Case, session: Session, benchmark: BenchmarkFixture) -> None:
    run(case, session, benchmark)
