"""Result files as typed rows, and what can be read off them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

_DIRTY = "+dirty"
_SWEEP = 3  # values of a field from which on a line through them says something


class Problem(NamedTuple):
    """What was computed, without who computed it."""

    loss: str
    samples: int
    width: int
    dtype: str
    modalities: int
    backward: bool

    def at(self, axis: str, value: int) -> Problem:
        """The problem with another number in one of its fields."""
        changed: Any = {axis: value}
        return self._replace(**changed)

    @property
    def title(self) -> str:
        name = {"gap": "InfoNCE + ATP + CU", "info_nce": "InfoNCE"}.get(self.loss, self.loss)
        scope = "forward + backward" if self.backward else "forward"
        parts = [name, f"N = {self.samples}", f"D = {self.width}", self.dtype, scope]
        if self.modalities != 2:
            parts.insert(3, f"{self.modalities} modalities")
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """One measurement. Times are in seconds, ``back_to_back`` per step; None stands for what was not measured."""

    implementation: str
    label: str
    note: str
    loss: str
    samples: int
    width: int
    dtype: str
    modalities: int
    backward: bool
    median: float
    iqr: float
    rounds: int
    operations: int
    tflops: float
    utilisation: float
    matmul_tflops: float
    matmul_dtype: str
    onednn_tflops: float | None
    peak_extra_bytes: int | None
    gradient_bytes: int
    clock: str
    loss_error: float | None
    gradient_error: float | None
    other_cpu_share: float
    back_to_back: float | None = None

    @property
    def problem(self) -> Problem:
        return Problem(self.loss, self.samples, self.width, self.dtype, self.modalities, self.backward)

    @property
    def ours(self) -> bool:
        return self.implementation.startswith("gapkernels")


@dataclass(frozen=True)
class Skip:
    """A case without a measurement, and why."""

    implementation: str
    label: str
    loss: str
    samples: int
    width: int
    dtype: str
    modalities: int
    backward: bool
    kind: str
    reason: str

    @property
    def problem(self) -> Problem:
        return Problem(self.loss, self.samples, self.width, self.dtype, self.modalities, self.backward)


@dataclass(frozen=True)
class Results:
    """A result file.

    Args:
        name: of the file, without suffix.
        device: GPU or CPU model.
        is_gpu: whether the times are those of a GPU.
        date: of the run, YYYY-MM-DD.
        commits: of the measured code, "+dirty" where files had changed since.
        versions: of what took part.
        rows, skips: in the order of measurement.
    """

    name: str
    device: str
    is_gpu: bool
    date: str
    commits: list[str]
    versions: dict[str, str]
    rows: list[Row]
    skips: list[Skip]

    def of(self, problem: Problem) -> list[Row]:
        """The rows of one problem, fastest first."""
        return sorted((row for row in self.rows if row.problem == problem), key=lambda row: row.median)

    def series(self, family: Problem, axis: str) -> dict[str, list[Row]]:
        """Rows that differ from a problem in one field only, by implementation and ascending in that field."""
        found: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: getattr(row, axis)):
            if row.problem.at(axis, getattr(family, axis)) == family:
                found.setdefault(row.implementation, []).append(row)
        return found

    def main_family(self, axis: str, loss: str) -> Problem | None:
        """The forward and backward problem which we were measured on for the most values of a field; three at least."""
        values: dict[Problem, set[int]] = {}
        for row in self.rows:
            if row.loss == loss and row.backward and row.ours:
                values.setdefault(row.problem.at(axis, 0), set()).add(getattr(row, axis))
        family = max(values, key=lambda problem: len(values[problem]), default=None)
        return family if family is not None and len(values[family]) >= _SWEEP else None

    def peer_problems(self) -> list[Problem]:
        """The problems to compare everybody on, for each loss and pass.

        First the one that the most implementations were measured on; then, where it is another, the one that the most
        were tried on, which shows who fails where others go on. Among equals the largest.
        """
        measured = Counter(row.problem for row in self.rows)
        tried = measured + Counter(skip.problem for skip in self.skips)
        found: dict[Problem, None] = {}
        for scope in sorted({(p.loss, not p.backward) for p, count in measured.items() if count > 1}):
            group = [p for p, count in measured.items() if count > 1 and (p.loss, not p.backward) == scope]
            for counts in (measured, tried):
                found[max(group, key=lambda p: (counts[p], p.samples, p))] = None
        return list(found)


def commit_note(commits: Sequence[str]) -> str:
    """Which code was measured, and whether it is all in the repository."""
    clean = sorted({commit.removesuffix(_DIRTY) for commit in commits})
    if len(clean) == 1:
        text = f"commit {clean[0]}"
    else:
        text = f"commits {', '.join(clean)} (one run, continued after the code had changed)"
    changed = [commit.removesuffix(_DIRTY) for commit in commits if commit.endswith(_DIRTY)]
    if not changed:
        return text
    scope = "all rows" if len(changed) == len(commits) else "some rows"
    return f"{text}; {scope} with changes to the measured code that were not committed yet"


def load(path: Path) -> Results:
    """Read a result file.

    Raises:
        ValueError: it is no result file of these benchmarks, or holds no rows.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = [entry["extra_info"] for entry in content["benchmarks"]]
        rows = [_build(Row, entry) for entry in facts]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a result file of the benchmarks ({error})") from error
    if not rows:
        raise ValueError(f"{path} holds no measurements")
    return Results(
        name=path.stem,
        device=facts[0]["device"],
        is_gpu=facts[0]["device_type"] != "cpu",
        date=content["datetime"][:10],
        commits=sorted({entry["commit"] for entry in facts}),
        versions={name: version for entry in facts for name, version in entry["versions"].items()},
        rows=rows,
        skips=[_build(Skip, {"label": entry["implementation"], **entry}) for entry in content.get("skipped", [])],
    )


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    required = {field.name for field in fields(kind) if field.default is MISSING}
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in required | values.keys()})


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of a straight line through the upper half of some points on logarithmic scales.

    The lower half of a sweep shows what a call costs before the first product, which says nothing about scaling.
    """
    upper = sorted(points)[len(points) // 2 :]
    if len(upper) < 2:
        return None
    x, y = ([math.log(point[index]) for point in upper] for index in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def fastest_of_ours(rows: Iterable[Row]) -> Row | None:
    """Our fastest row, if there is any."""
    return min((row for row in rows if row.ours), key=lambda row: row.median, default=None)
