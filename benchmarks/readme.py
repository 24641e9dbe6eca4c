"""Write README's tables and plots, and the table of options in docs/which-loss.md, from the committed result files.

    python -m benchmarks.readme

Only what stands between the two markers is replaced. A test compares the README with the result files, so that neither
changes without the other.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.cases import GAP, option_of
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.options import ALL
from gapkernels.benchmark_report import plots, tables
from gapkernels.benchmark_report.page import scaling_sections
from gapkernels.benchmark_report.results import Problem, Results, Row, fastest_of_ours, load
from gapkernels.training.results import Statistic, table_rows

SPEED, DEMO, OPTIONS = "speed", "demo", "options"
ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
WHICH_LOSS = ROOT / "docs" / "which-loss.md"
RESULTS = ROOT / "benchmarks" / "results"
OPTION_RESULTS = RESULTS / "options"
IMAGES = ROOT / "docs" / "images"


def result_files() -> list[Path]:
    """The committed result files."""
    return sorted(RESULTS.glob("*.json"))


def latest_of_each_device(paths: Sequence[Path]) -> list[Results]:
    """The newest results of every device; first the one that the README shows in full.

    That is the newest of a GPU, or, without one, the one that measured the most of our backends, and of several the
    one with the most rows.
    """
    newest: dict[str, Results] = {}
    for results in sorted(map(load, paths), key=lambda results: (results.date, results.name)):
        newest[results.device] = results
    return sorted(newest.values(), key=_prominence, reverse=True)


def _prominence(results: Results) -> tuple[bool, str, int, int, str]:
    ours = {row.implementation for row in results.rows if row.implementation.startswith("gapkernels-")}
    return results.is_gpu, results.date if results.is_gpu else "", len(ours), len(results.rows), results.name


def block(devices: Sequence[Results]) -> str:
    """What stands between the markers: the first device in full, of the others a line each."""
    main, *others = devices
    parts = [_section(main)]
    if others:
        parts.append("Other devices:\n\n" + "\n".join(f"* {_line(results)}" for results in others))
    return "\n\n".join(parts)


def images(devices: Sequence[Results]) -> dict[str, bytes]:
    """The plots that the block refers to, by file name."""
    main = devices[0]
    family = main.main_family("samples", "gap")
    if family is None:
        return {}
    found = {"time": plots.draw_time(main, family), "memory": plots.draw_memory(main, family)}
    return {_image_name(main, kind): plot.png for kind, plot in found.items() if plot is not None}


def demo_block() -> str:
    """The table that `make train` prints, from the committed results of that preset."""
    content = json.loads((RESULTS / "training" / "digit-halves.json").read_text(encoding="utf-8"))
    summary = {
        method: {key: Statistic(value["mean"], value["std"]) for key, value in run["metrics"].items()}
        for method, run in content["methods"].items()
    }
    runs = list(content["methods"].values())
    seeds = len(runs[0]["seeds"])
    minutes = sum(sum(run["seconds"]) for run in runs) / 60
    device = content["environment"]["devices"][-1]["description"]
    return (
        f"What `make train` shows (mean ± standard deviation over {seeds} seeds, {minutes:.1f} minutes on "
        f"{device}; [all figures](benchmarks/results/training/digit-halves.json)):\n\n"
        f"{tables.markdown(table_rows(summary))}"
    )


def options_block() -> str:
    """The table of every option beside its dense form, one for each result file."""
    return "\n\n".join(_options_of(load(path)) for path in sorted(OPTION_RESULTS.glob("*.json")))


def _options_of(results: Results) -> str:
    heading = ["option", "type", "time", "dense form", "times as fast", "extra memory", "dense form", "times less"]
    table = [heading]
    for name, option in ALL.items():
        for problem in sorted({row.problem for row in results.rows if option_of(row.loss) == name}, reverse=True):
            rows = {row.implementation: row for row in results.of(problem)}
            ours, dense = fastest_of_ours(list(rows.values())), rows.get("dense")
            if ours is None or dense is None or not ours.peak_extra_bytes or not dense.peak_extra_bytes:
                continue
            line = [option.title, problem.dtype, tables.seconds(ours.median), tables.seconds(dense.median)]
            line += [tables.significant(dense.median / ours.median) + "×", tables.size(ours.peak_extra_bytes)]
            line += [tables.size(dense.peak_extra_bytes)]
            line += [tables.significant(dense.peak_extra_bytes / ours.peak_extra_bytes) + "×"]
            table.append(line)
    sizes = {(row.samples, row.width) for row in results.rows}
    ((samples, width),) = sizes
    path = f"../benchmarks/results/options/{results.name}.json"
    return (
        f"InfoNCE with each option, forward + backward, N = {samples}, D = {width}, on {results.device}, torch "
        f"{results.versions['torch']}, {results.date} ([all rows]({path})). The dense form is torch's own functions on "
        "the N×N matrix and autograd, without float64. Extra memory is the peak beyond the inputs, gradients included."
        f"\n\n{tables.markdown(table)}"
    )


def replace_block(text: str, content: str, name: str = SPEED) -> str:
    """A page with another block between the markers of a name.

    Raises:
        ValueError: it lacks the markers.
    """
    opening, closing = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end:
        raise ValueError(f"there is no {opening} … {closing} in the page")
    return f"{before}{begin}\n{content}\n{end}{after}"


def fingerprint(results: Results) -> str:
    """Changes whenever a result file does; part of the images' names, so that stale images are noticed."""
    path = RESULTS / f"{results.name}.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def _image_name(results: Results, kind: str) -> str:
    return f"speed-{results.name}-{kind}-{fingerprint(results)}.png"


def _section(results: Results) -> str:
    lines = [
        f"Measured on {results.device}, torch {results.versions['torch']}, {results.date} "
        f"([all rows](benchmarks/results/{results.name}.json)); {tables.yardstick(results.rows)}. "
        "Extra memory is the peak beyond the inputs, gradients included; errors are relative, against float64."
    ]
    for problem in results.peer_problems():
        if problem.backward:
            table = _short(tables.peer_table(results, problem))
            lines += [f"**{problem.title}**", tables.markdown(table)]
            if tables.marked(table):
                lines.append("\\" + tables.MARK_MEANING)
    sizes = _by_size(results)
    if len(sizes) > 1:
        lines += ["**By size (InfoNCE + ATP + CU, forward + backward)**", tables.markdown(sizes)]
    lines += [_memory_sentence(results, problem) for problem in _memory_problems(results)]
    for title, table in scaling_sections(results):
        if "ATP" in title:
            lines += [f"**Growth with N ({title})**", tables.markdown(table)]
    family = results.main_family("samples", "gap")
    if family is not None:
        pictures = [
            f'<img src="docs/images/{_image_name(results, kind)}" width="49%" alt="{what} against batch size">'
            for kind, what in (("time", "time"), ("memory", "peak memory"))
        ]
        lines.append("\n".join(pictures))
    return "\n\n".join(lines)


def _range_of_sizes(results: Results) -> str:
    """What ``_by_size`` comes to, in a clause."""
    times = [faster / ours.median for _, ours, _, faster in _compared(results)]
    if len(times) < 2:
        return ""
    return (
        f"; of {len(times)} sizes and types the faster of the matmul form and its torch.compile takes from "
        f"{tables.significant(min(times))} to {tables.significant(max(times))} times as long as ours, in the median "
        f"{tables.significant(statistics.median(times))}"
    )


def _by_size(results: Results) -> tables.Table:
    """Every size of the whole loss that ours and the matmul form were measured on, smallest first."""
    matmul, compiled = IMPLEMENTATIONS["matmul"].label, IMPLEMENTATIONS["matmul-compile"].label
    table = [["type", "D", "N", "gapkernels", matmul, compiled, "the faster of them vs ours"]]
    for problem, ours, others, faster in _compared(results):
        shown = ["–" if row is None else tables.seconds(row.median) for row in others]
        line = [problem.dtype, str(problem.width), str(problem.samples), tables.seconds(ours.median), *shown]
        table.append([*line, tables.significant(faster / ours.median) + "×"])
    return table


def _compared(results: Results) -> Iterator[tuple[Problem, Row, list[Row | None], float]]:
    """Problem, our fastest, the matmul form and its torch.compile, and the shorter of their times in seconds."""
    problems = {row.problem for row in results.rows if row.loss == GAP and row.backward and row.modalities == 2}
    for problem in sorted(problems, key=lambda p: (p.dtype != "float32", p.width, p.samples)):
        rows = {row.implementation: row for row in results.of(problem)}
        ours = fastest_of_ours(list(rows.values()))
        others = [rows.get(name) for name in ("matmul", "matmul-compile")]
        times = [row.median for row in others if row is not None]
        if ours is not None and times:
            yield problem, ours, others, min(times)


def _line(results: Results) -> str:
    """What a device measured, on the first problem that everybody is compared on."""
    text = f"{results.device}, torch {results.versions['torch']}, {results.date}"
    rows_file = f"[all rows](benchmarks/results/{results.name}.json)"
    problem = next((problem for problem in results.peer_problems() if problem.backward), None)
    ours = fastest_of_ours(results.of(problem)) if problem is not None else None
    if problem is None or ours is None:
        return f"{text} ({rows_file})"
    text = f"{text}: {problem.title} in {tables.seconds(ours.median)}, utilisation {ours.utilisation:.2f}"
    others = [
        f"{row.label} {tables.significant(row.median / ours.median)}×" for row in results.of(problem) if not row.ours
    ]
    relative = f"; time relative to that: {'; '.join(others)}" if others else ""
    return f"{text}{relative}{_range_of_sizes(results)} ({rows_file})"


def _short(table: tables.Table) -> tables.Table:
    """Without the error of the loss, which is smaller than that of the gradient."""
    keep = [index for index, name in enumerate(table[0]) if name != "loss error"]
    return [[line[index] for index in keep] for line in table]


def _memory_problems(results: Results) -> list[Problem]:
    """Problems of the sweep that only we were measured on, or the largest with the authors; the largest of each."""
    ours = {row.problem for row in results.rows if row.ours and row.backward}
    authors = {row.problem for row in results.rows if row.implementation == "authors" and row.backward}
    largest = [
        max(group, key=lambda p: (p.samples, p.width, p.loss, p.dtype, p.modalities), default=None)
        for group in (ours & authors, ours - authors)
    ]
    return [problem for problem in largest if problem is not None]


def _memory_sentence(results: Results, problem: Problem) -> str:
    rows = results.of(problem)
    ours = min((row for row in rows if row.ours), key=lambda row: row.median)
    text = f"{problem.title}: {tables.seconds(ours.median)} with {tables.size(ours.peak_extra_bytes)} of extra memory"
    theirs = next((row for row in rows if row.implementation == "authors"), None)
    if theirs is None or not theirs.peak_extra_bytes or not ours.peak_extra_bytes:
        return text + "."
    ratio = tables.significant(theirs.peak_extra_bytes / ours.peak_extra_bytes)
    return (
        f"{text}; the authors' formulation takes {tables.seconds(theirs.median)} and "
        f"{tables.size(theirs.peak_extra_bytes)}, {ratio} times as much."
    )


def main() -> None:
    paths = result_files()
    if not paths:
        sys.exit(f"no result files in {RESULTS.relative_to(ROOT)}")
    devices = latest_of_each_device(paths)
    text = replace_block(README.read_text(encoding="utf-8"), block(devices))
    README.write_text(replace_block(text, demo_block(), DEMO), encoding="utf-8")
    page = WHICH_LOSS.read_text(encoding="utf-8")
    WHICH_LOSS.write_text(replace_block(page, options_block(), OPTIONS), encoding="utf-8")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for stale in IMAGES.glob("speed-*.png"):
        stale.unlink()
    for name, png in images(devices).items():
        (IMAGES / name).write_bytes(png)


if __name__ == "__main__":
    main()
