"""pytest-benchmark hooks: which cases run, and what goes into the result file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import cases, results
from benchmarks.harness import Session
from benchmarks.implementations import groups
from benchmarks.timing import clock_of

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gapkernels benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to measure")
    group.addoption("--case-seconds", type=float, default=5.0, help="about how long to repeat one case")
    group.addoption("--call-seconds", type=float, default=60.0, help="leave out calls that take longer")
    group.addoption("--slow", action="store_true", help="include cases that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SESSION] = Session(
        torch.device(config.getoption("--device")),
        case_seconds=config.getoption("--case-seconds"),
        call_seconds=config.getoption("--call-seconds"),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The one test runs over the cases of all suites, each problem in the first suite that has it."""
    if "case" not in metafunc.fixturenames:
        return
    device = metafunc.config.stash[_SESSION].device
    table = cases.table_of(device.type)
    clock = pytest.mark.benchmark(timer=clock_of(device), warmup=False)
    parameters: dict[cases.Case, Any] = {}
    for suite in table:
        for case in cases.cases([suite], table, groups(device)):
            if not case.slow or metafunc.config.getoption("--slow"):
                parameters.setdefault(case, pytest.param(case, id=f"{suite}-{case.id}", marks=clock))
    metafunc.parametrize("case", list(parameters.values()))


@pytest.fixture
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Name the device and not the machine."""
    device = config.stash[_SESSION].device
    machine_info.clear()
    machine_info.update(device=results.device_name(device), versions=results.versions())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.clear()
    commit_info["id"] = results.commit()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """What could not be measured is a result too."""
    output_json["skipped"] = config.stash[_SESSION].skipped
    results.share_yardstick([entry["extra_info"] for entry in output_json["benchmarks"]])
    for entry in output_json["benchmarks"]:
        entry.pop("param", None)
        entry.pop("params", None)
