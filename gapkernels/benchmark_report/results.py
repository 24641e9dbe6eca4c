"""Result files as typed rows, and what can be read off them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
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
    """Read a result file; nobody else asks whether what is in it makes sense.

    Raises:
        ValueError: it is no result file of these benchmarks, or holds no rows; names the first wrong field.
    """
    from gapkernels.errors import UserError

    try:
        return _load(path)
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path} is not a result file of the benchmarks ({reason})") from error


def _load(path: Path) -> Results:
    from typing import get_type_hints

    from pydantic import Field, create_model

    from gapkernels.errors import UserError, shown
    from gapkernels.reading import Strict, read_json

    positive, share = {"gt": 0, "le": 10**30}, {"ge": 0, "le": 10**30}
    size, word = {"ge": 1, "le": 2**40}, {"pattern": r"^\w[\w+-]{0,39}$"}
    limits: dict[str, dict[str, Any]] = {
        **dict.fromkeys(("median", "rounds", "operations", "back_to_back"), positive),
        **dict.fromkeys(("tflops", "matmul_tflops", "onednn_tflops"), positive),
        **dict.fromkeys(("iqr", "utilisation", "peak_extra_bytes", "gradient_bytes"), share),
        **dict.fromkeys(("loss_error", "gradient_error", "other_cpu_share"), share),
        **dict.fromkeys(("samples", "width", "modalities"), size),
        # These become parts of file names.
        **dict.fromkeys(("loss", "dtype"), word),
    }

    def model(kind: type[Any], **more: Any) -> Any:
        hints = get_type_hints(kind)
        known: Any = {
            field.name: (
                hints[field.name],
                Field(default=... if field.default is MISSING else field.default, **limits.get(field.name, {})),
            )
            for field in fields(kind)
        }
        return create_model(kind.__name__, __base__=Strict, **{**known, **more})

    text: Any = (str, ...)
    row: Any = model(Row, device=text, device_type=text, commit=text, versions=(dict[str, str], ...))
    skip: Any = model(Skip, label=(str | None, None))
    measured = create_model("Benchmark", __base__=Strict, extra_info=(row, ...))
    document: Any = create_model(
        "ResultFile",
        __base__=Strict,
        datetime=(str, Field(pattern=r"^\d{4}-\d\d-\d\d")),
        benchmarks=(list[measured], ...),  # type: ignore[valid-type]
        skipped=(list[skip], []),
    )
    content = read_json(path, document)
    facts = [entry.extra_info for entry in content.benchmarks]
    if not facts:
        raise UserError("it holds no measurements")
    rows = [_build(Row, entry) for entry in facts]
    seen: dict[tuple[str, Problem], int] = {}
    for number, (entry, fact) in enumerate(zip(rows, facts, strict=True)):
        case = entry.implementation, entry.problem
        if case in seen:
            raise UserError(f"benchmarks.{number} measures the case of benchmarks.{seen[case]} again")
        seen[case] = number
        if (fact.device, fact.device_type) != (facts[0].device, facts[0].device_type):
            found, first = shown(fact.device), shown(facts[0].device)
            raise UserError(f"benchmarks.{number}.extra_info.device is {found}, that of the first row {first}")
    return Results(
        name=path.stem,
        device=facts[0].device,
        is_gpu=facts[0].device_type != "cpu",
        date=content.datetime[:10],
        commits=sorted({entry.commit for entry in facts}),
        versions={name: version for entry in facts for name, version in entry.versions.items()},
        rows=rows,
        skips=[
            replace(_build(Skip, entry), label=entry.implementation if entry.label is None else entry.label)
            for entry in content.skipped
        ],
    )


def _build(kind: type[Any], values: Any) -> Any:
    return kind(**{field.name: getattr(values, field.name) for field in fields(kind)})


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
