"""pytest-benchmark hooks: which cases run, and what goes into the result file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import cases, environment, results
from benchmarks.harness import Session, clock_of
from benchmarks.implementations import our_backends

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gapkernels benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to measure")
    group.addoption("--case-seconds", type=float, default=5.0, help="about how long to repeat one case")
    group.addoption("--call-seconds", type=float, default=60.0, help="leave out calls that take longer")
    group.addoption("--wait-seconds", type=float, default=0.0, help="wait this long for other processes to calm down")
    group.addoption("--slow", action="store_true", help="include cases that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SESSION] = Session(
        torch.device(config.getoption("--device")),
        case_seconds=config.getoption("--case-seconds"),
        call_seconds=config.getoption("--call-seconds"),
        wait_seconds=config.getoption("--wait-seconds"),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test of a suite runs over the cases of the table that bears its name, on the device's clock."""
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    device = config.stash[_SESSION].device
    table = cases.table_of(device.type)
    suite = metafunc.function.__name__.removeprefix("test_")
    # A problem that an earlier suite measures already is not measured again.
    earlier = list(table)[: list(table).index(suite)] if suite in table else []
    backends = our_backends(device)
    done = set(cases.cases(earlier, table, backends))
    found = [case for case in cases.cases([suite] if suite in table else [], table, backends) if case not in done]
    clock = pytest.mark.benchmark(timer=clock_of(device), warmup=False)
    metafunc.parametrize(
        "case",
        [pytest.param(case, id=case.id, marks=clock) for case in found if not case.slow or config.getoption("--slow")],
    )


@pytest.fixture
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Name the device and not the machine."""
    device = config.stash[_SESSION].device
    machine_info.clear()
    machine_info.update(device=environment.device_name(device), versions=environment.versions())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.clear()
    commit_info["id"] = environment.commit()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """What could not be measured is a result too."""
    output_json["skipped"] = config.stash[_SESSION].skipped
    results.share_yardstick([entry["extra_info"] for entry in output_json["benchmarks"]])
    for entry in output_json["benchmarks"]:
        entry.pop("param", None)
        entry.pop("params", None)
