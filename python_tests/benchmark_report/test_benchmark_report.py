"""Reports from made-up result files whose exponents, ratios and gaps are known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hostile import FUZZ, one_line, spoiled
from hypothesis import given, settings
from hypothesis import strategies as st

from gapkernels.benchmark_report import page, plots, render, tables
from gapkernels.benchmark_report.results import Problem, commit_note, exponent, load
from gapkernels.cli import main

pytest.importorskip("matplotlib")

FAMILY = {"loss": "gap", "width": 512, "dtype": "float32", "modalities": 2, "backward": True}


def row(implementation: str, label: str, seconds: float, memory: int, **problem: Any) -> dict[str, Any]:
    problem = {**FAMILY, **problem}
    operations = 12 * problem["samples"] ** 2 * problem["width"]
    return {
        **problem,
        "implementation": implementation,
        "label": label,
        "note": "",
        "device": "Test CPU <1>",
        "device_type": "cpu",
        "versions": {"python": "3", "torch": "2"},
        "commit": "0123456789ab",
        "median": seconds,
        "iqr": seconds / 10,
        "rounds": 5,
        "operations": operations,
        "tflops": operations / seconds / 1e12,
        "utilisation": operations / seconds / 1e11,
        "matmul_tflops": 0.1,
        "matmul_dtype": "float32",
        "onednn_tflops": 0.2,
        "peak_extra_bytes": memory,
        "gradient_bytes": problem["samples"] * problem["width"] * 8,
        "loss_error": 1e-7,
        "gradient_error": None,
        "other_cpu_share": 0.02,
        "clock": "wall",
    }


def document(device: str = "Test CPU <1>", device_type: str = "cpu") -> dict[str, Any]:
    rows = []
    for n in (256, 512, 1024, 2048, 4096):
        work = 12 * n**2 * 512
        rows.append(row("gapkernels-torch", "gapkernels (torch)", work / 1.5e11, n * 512 * 16, samples=n))
        if n <= 2048:
            rows.append(row("authors", "authors' formulation", work / 0.3e11, 20 * n**2, samples=n))
    for width in (64, 128, 256):
        work = 12 * 2048**2 * width
        rows.append(row("gapkernels-torch", "gapkernels (torch)", work / 1e11, 2**20, samples=2048, width=width))
    for entry in rows:
        entry.update(device=device, device_type=device_type)
    stop = {**FAMILY, "samples": 4096, "implementation": "authors", "label": "authors' formulation"}
    return {
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"extra_info": entry} for entry in rows],
        "skipped": [
            {**stop, "kind": "memory", "reason": "out of memory (limit 1.0 GiB)"},
            {**stop, "samples": 2048, "implementation": "peer", "label": "peer", "kind": "missing", "reason": "absent"},
        ],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(document()))
    return file


def test_exponent() -> None:
    assert exponent([(n, 3e-9 * n**2) for n in (64, 128, 256, 512)]) == pytest.approx(2)
    # What a call costs at least does not count.
    assert exponent([(n, max(1e-3, 1e-9 * n**1.5)) for n in (16, 32, 64, 2**15, 2**16, 2**17)]) == pytest.approx(1.5)
    assert exponent([(1024, 1.0)]) is None


def test_tables(path: Path) -> None:
    results = load(path)
    problem = Problem("gap", 2048, 512, "float32", 2, True)
    assert results.peer_problems() == [problem]
    heading, ours, authors, peer = tables.peer_table(results, problem)
    assert [line[0] for line in (ours, authors, peer)] == ["gapkernels (torch)", "authors' formulation", "peer"]
    assert ours[2] == "1.00×"
    assert authors[2] == "5.00×"
    assert authors[heading.index("extra memory")] == "80.0 MiB"
    assert authors[heading.index("gradient error")] == tables.NOTHING
    assert peer[1] == "absent"

    family = results.main_family("samples", "gap")
    assert family is not None
    _, ours, authors = tables.scaling_table(results, family)
    assert ours == ["gapkernels (torch)", "N^2.00", "N^1.00", "4096", "not tried beyond"]
    assert authors == ["authors' formulation", "N^2.00", "N^2.00", "2048", "N = 4096: out of memory (limit 1.0 GiB)"]


def test_times_back_to_back_are_shown_where_a_file_has_them(path: Path) -> None:
    """On a GPU; files from before there were any remain readable."""
    results = load(path)
    assert {row.back_to_back for row in results.rows} == {None}
    assert "back to back" not in tables.full_table(results)[0]
    rows = [replace(results.rows[0], back_to_back=0.0125), *results.rows[1:]]
    heading, *lines = tables.full_table(replace(results, is_gpu=True, rows=rows))
    column = [line[heading.index("back to back")] for line in lines]
    assert sorted(column) == ["12.5 ms", *[tables.NOTHING] * (len(rows) - 1)]


def test_a_peer_and_its_compiled_forms_share_a_colour(path: Path) -> None:
    results = load(path)
    names = ["gapkernels-torch", "matmul", "keops", "gapkernels-cuda", "matmul-compile", "matmul-max-autotune"]
    rows = [replace(results.rows[0], implementation=name) for name in names]
    styles = plots.styles(replace(results, rows=rows))
    assert list(styles) == names
    assert len({style.color for style in styles.values()}) == 4
    assert len({styles[name].color for name in names if name.startswith("matmul")}) == 1
    assert len({(style.color, style.line) for style in styles.values()}) == len(names)
    assert len({style.marker for style in styles.values()}) == len(names)


def test_two_sizes_or_several_backends_are_no_sweep(path: Path) -> None:
    results = load(path)
    rows = [row for row in results.rows if row.samples in (256, 512) and row.width == 512]
    others = [replace(row, implementation="gapkernels-triton") for row in rows]
    few = replace(results, rows=rows + others)
    assert few.main_family("samples", "gap") is None
    assert few.main_family("width", "gap") is None
    assert not any(plot.name.startswith(("time", "memory", "utilisation")) for plot in plots.draw(few))


def test_peers_are_compared_where_most_succeed_and_where_most_were_tried(tmp_path: Path) -> None:
    content = document()
    stop = {**FAMILY, "samples": 4096, "kind": "memory", "reason": "out of memory"}
    content["skipped"] += [{**stop, "implementation": name, "label": name} for name in ("a", "b")]
    file = tmp_path / "two.json"
    file.write_text(json.dumps(content))
    # One row at 4096 is no comparison, two are.
    results = load(file)
    assert [problem.samples for problem in results.peer_problems()] == [2048]
    for samples in (2048, 4096):
        other = row("gapkernels-triton", "gapkernels (triton)", 1.0, 2**20, samples=samples)
        content["benchmarks"].append({"extra_info": other})
    file.write_text(json.dumps(content))
    results = load(file)
    problems = results.peer_problems()
    assert [problem.samples for problem in problems] == [2048, 4096]
    table = tables.peer_table(results, problems[1])
    assert [line[1] for line in table[-3:]] == ["out of memory (limit 1.0 GiB)", "out of memory", "out of memory"]
    names = [plot.name for plot in plots.draw(results)]
    assert len(set(names)) == len(names)


def test_who_runs_out_of_memory_is_crossed_out(path: Path) -> None:
    results = load(path)
    family = results.main_family("samples", "gap")
    assert family is not None
    captions = [plots.draw_time(results, family).caption, plots.draw_memory(results, family).caption]
    assert all(caption.endswith("A cross: the next size ran out of memory.") for caption in captions)
    without = replace(results, skips=[replace(skip, kind="time") for skip in results.skips])
    assert "cross" not in plots.draw_time(without, family).caption


@pytest.mark.parametrize(
    ("commits", "note"),
    [
        (["a"], "commit a"),
        (["a+dirty"], "commit a; all rows with changes to the measured code that were not committed yet"),
        (["a", "a+dirty"], "commit a; some rows with changes to the measured code that were not committed yet"),
        (["a", "b"], "commits a, b (one run, continued after the code had changed)"),
    ],
)
def test_commit_note(commits: list[str], note: str) -> None:
    assert commit_note(commits) == note


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the text; drawing takes seconds."""
    monkeypatch.setattr(plots, "draw", lambda results: [])


@pytest.mark.usefixtures("no_plots")
def test_commits_are_on_the_page(tmp_path: Path) -> None:
    content = document()
    content["benchmarks"][0]["extra_info"]["commit"] = "0123456789ab+dirty"
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(content))
    report = render([file], tmp_path / "report.html")
    expected = "commit 0123456789ab; some rows with changes to the measured code that were not committed yet"
    assert expected in report.html.read_text()
    assert expected in report.markdown.read_text()


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (123.4, "123 s"), (9.996, "10.0 s")]
)
def test_seconds(value: float, text: str) -> None:
    assert tables.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (2**20, "1.00 MiB"), (3 * 2**30, "3.00 GiB")])
def test_size(value: float | None, text: str) -> None:
    assert tables.size(value) == text


@pytest.mark.usefixtures("no_plots")
def test_disturbed_measurements_are_marked(tmp_path: Path) -> None:
    content = document()
    for entry in content["benchmarks"]:
        if entry["extra_info"]["implementation"] == "authors":
            entry["extra_info"]["other_cpu_share"] = 0.3
    file = tmp_path / "noisy.json"
    file.write_text(json.dumps(content))
    results = load(file)
    table = tables.peer_table(results, results.peer_problems()[0])
    assert tables.marked(table)
    assert [line[0] for line in table if line[1].endswith(tables.MARK)] == ["authors' formulation"]
    report = render([file], tmp_path / "report.html")
    assert tables.MARK_MEANING in report.html.read_text()
    assert "\\" + tables.MARK_MEANING in report.markdown.read_text()


class _Page(HTMLParser):
    """Collects what a page refers to, and checks that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_of_two_devices_is_self_contained(path: Path, tmp_path: Path) -> None:
    gpu = tmp_path / "gpu.json"
    gpu.write_text(json.dumps(document("Test GPU", "cuda")))
    report = render([path, gpu], tmp_path / "out" / "report.html")
    text = report.html.read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert len(page.references) == len(report.images)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "Test CPU &lt;1&gt;" in text
    assert "N\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}2048" in text
    assert {image.name for image in report.images} == {
        "devices.png",
        *(
            f"{kind}-{name}{rest}.png"
            for name in ("cpu", "gpu")
            for kind, rest in (
                ("time", "-gap"),
                ("memory", "-gap"),
                ("utilisation", ""),
                ("speedup", "-gap-both-N2048-D512"),
            )
        ),
    }
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in report.images)
    markdown = report.markdown.read_text()
    assert markdown.count("\n# ") + markdown.startswith("# ") == 2
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", '{"benchmarks": [], "datetime": ""}'])
def test_other_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"other.json"):
        load(file)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("median", 0, "benchmarks.2.extra_info.median: input should be greater than 0, got 0"),
        ("median", None, "benchmarks.2.extra_info.median: input should be a valid number, got None"),
        ("median", float("nan"), "benchmarks.2.extra_info.median: input should be a finite number, got nan"),
        ("versions", [], "benchmarks.2.extra_info.versions: input should be"),
        ("samples", 2.5, "benchmarks.2.extra_info.samples: input should be a valid integer, got 2.5"),
        ("loss", "../../x", "benchmarks.2.extra_info.loss: string should match pattern"),
        ("device", "another", "benchmarks.2.extra_info.device is 'another', that of the first row 'Test CPU <1>'"),
        ("backward", "yes", "benchmarks.2.extra_info.backward: input should be a valid boolean, got 'yes'"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any, words: str, tmp_path: Path) -> None:
    content = document()
    content["benchmarks"][2]["extra_info"][field] = value
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(words)):
        load(file)
    file.write_text(json.dumps({key: entry for key, entry in document().items() if key != "datetime"}))
    with pytest.raises(ValueError, match="datetime is missing"):
        load(file)
    content = document()
    content["benchmarks"].append(content["benchmarks"][0])
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"benchmarks\.12 measures the case of benchmarks\.0 again"):
        load(file)


@FUZZ
@given(data=st.data())
def test_any_value_in_a_result_file_is_read_or_named(tmp_path: Path, data: st.DataObject) -> None:
    content = document()
    content["benchmarks"] = [content["benchmarks"][number] for number in (0, 1, 2, 4, 6, 8)]
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(data.draw(spoiled(content))))
    try:
        results = load(file)
    except ValueError as error:
        one_line(error, "cpu.json")
        return
    text = page._markdown(results)
    assert "<" not in text
    assert page._html([results], [[]], [])


@settings(FUZZ, max_examples=10)
@given(label=st.text(max_size=30) | st.sampled_from(["$", r"$\frac", "<b>", "_x", "a|b", "a\nb"]))
def test_labels_of_any_kind_are_drawn(tmp_path: Path, label: str) -> None:
    content = document()
    for entry in content["benchmarks"]:
        if entry["extra_info"]["implementation"] == "authors":
            entry["extra_info"]["label"] = label
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(content))
    report = render([file], tmp_path / "report.html")
    assert len(report.images) > 3
    tables_in_text = re.findall(r"(?:^\|.*\n)+", report.markdown.read_text(), flags=re.MULTILINE)
    for block in tables_in_text:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.mark.usefixtures("no_plots")
def test_command_line(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.html"
    assert main(["report", str(path), "--out", str(out)]) == 0
    assert out.exists()
    assert f"report: {out}" in capsys.readouterr().out

    assert main(["report", str(path), str(tmp_path), "--out", str(out)]) == 2
    assert "run folders and result files (.json) do not go into one report" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent.json"), "--out", str(out)]) == 2
    assert "absent.json" in capsys.readouterr().err
