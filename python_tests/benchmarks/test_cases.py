"""The tables of cases and the count of operations."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import COMPILED, CPU, GAP, GPU, INFO_NCE, LIBRARIES, ON_REQUEST, OURS, Case, cases
from benchmarks.implementations import IMPLEMENTATIONS, groups

GROUPS = {**groups(torch.device("cpu")), OURS: ["gapkernels-cuda"]}


@pytest.mark.parametrize(
    ("case", "multiple"),
    [
        (Case("", GAP), 12),
        (Case("", GAP, backward=False), 3),
        (Case("", INFO_NCE), 8),
        (Case("", INFO_NCE, backward=False), 2),
        (Case("", GAP, modalities=3), 20),
        (Case("", f"{INFO_NCE}+ids"), 8),
        (Case("", f"{INFO_NCE}+negatives"), 14),
    ],
)
def test_operations_are_those_of_the_products(case: Case, multiple: int) -> None:
    assert case.operations() == multiple * case.samples**2 * case.width


@pytest.mark.parametrize("table", [CPU, GPU], ids=["CPU", "GPU"])
def test_tables_have_every_peer_and_no_problem_twice(table: dict) -> None:
    """Also those whose entry alone says that they exist."""
    found = cases(table, table, GROUPS)
    assert len({case.id for case in found}) == len(found)
    peers = {name for name, entry in IMPLEMENTATIONS.items() if not entry.backend}
    assert {case.implementation for case in found} == {"gapkernels-cuda", *peers}


def test_groups() -> None:
    assert {"matmul-compile", "matmul-max-autotune"} == set(GROUPS[COMPILED])
    assert {"open-clip", "keops"} < set(GROUPS[LIBRARIES])
    assert groups(torch.device("cpu"))[OURS][-1] == "gapkernels-torch"
    assert "gapkernels-cpu" not in groups(torch.device("cuda"))[OURS]
    for table in ON_REQUEST.values():
        assert cases(table, table, GROUPS)


def test_our_name_stands_for_every_backend() -> None:
    found = cases(["large"], CPU, {OURS: ["gapkernels-a", "gapkernels-b"]})
    assert {case.implementation for case in found} == {"gapkernels-a", "gapkernels-b"}
    assert all(case.slow for case in found)


def test_sweep_on_a_gpu_reaches_a_million() -> None:
    found = cases(["scaling"], GPU, GROUPS)
    ours = {c.samples for c in found if c.implementation == "gapkernels-cuda" and c.loss == GAP and c.backward}
    assert ours == {2**exponent for exponent in range(8, 21)}


def test_everybody_is_compared_where_all_fit_and_where_only_some_do() -> None:
    found = cases(["peers"], GPU, GROUPS)
    for samples in (4096, 32768):
        names = {c.implementation for c in found if (c.loss, c.samples, c.backward) == (GAP, samples, True)}
        assert names == {"gapkernels-cuda", "authors", "authors-compile", "matmul", *GROUPS[COMPILED]}


def test_targets_come_first_on_a_gpu() -> None:
    """A run may end anywhere: by then the figures that the project has set itself should be there."""
    assert next(iter(GPU)) == "targets"
    targets = [c for c in cases(["targets"], GPU, GROUPS) if c.implementation == "gapkernels-cuda"]
    assert (targets[0].loss, targets[0].samples, targets[0].width, targets[0].dtype) == (GAP, 32768, 512, "bfloat16")
    assert (INFO_NCE, 65536, 768) in {(c.loss, c.samples, c.width) for c in targets}
    assert {256, 1024, 2048, 2**20} < {c.samples for c in targets if c.loss == GAP}
    assert all(c.backward for c in targets)
