"""README shows the numbers of the committed result files, and no others."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from benchmarks import readme


def test_block_is_replaced_and_nothing_else() -> None:
    text = "before\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nafter\n"
    assert readme.replace_block(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="no <!-- speed:begin -->"):
        readme.replace_block("no markers", "new")


def test_readme_matches_the_result_files() -> None:
    text = readme.README.read_text(encoding="utf-8")
    paths = readme.result_files()
    assert paths, "no result files are committed"
    devices = readme.latest_of_each_device(paths)
    assert readme.replace_block(text, readme.block(devices)) == text, "run: python -m benchmarks.readme"
    assert readme.replace_block(text, readme.demo_block(), readme.DEMO) == text, "run: python -m benchmarks.readme"
    shown = set(re.findall(r"docs/images/(speed-[^\"]+\.png)", text))
    assert shown == {path.name for path in readme.IMAGES.glob("speed-*.png")}
    assert shown


def test_table_of_options_is_that_of_the_result_files() -> None:
    text = readme.WHICH_LOSS.read_text(encoding="utf-8")
    assert list(readme.OPTION_RESULTS.glob("*.json"))
    changed = readme.replace_block(text, readme.options_block(), readme.OPTIONS)
    assert changed == text, "run: python -m benchmarks.readme"


def test_one_device_is_shown_in_full_and_the_others_in_a_line(tmp_path: Path) -> None:
    """Of the CPUs the one with the most rows, whatever its date; a GPU before any CPU, the newest of several."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in readme.result_files()]
    content = max(contents, key=lambda content: len(content["benchmarks"]))
    large = {"loss": "gap", "samples": 4096, "dtype": "float32"}  # first, whatever the order of the file
    content["benchmarks"].sort(key=lambda entry: not large.items() <= entry["extra_info"].items())
    full = len(content["benchmarks"])
    assert full > 10

    def write(name: str, device: str, device_type: str, date: str, rows: int) -> Path:
        changed = copy.deepcopy(content)
        changed["datetime"] = date
        changed["benchmarks"] = changed["benchmarks"][:rows]
        for entry in changed["benchmarks"]:
            entry["extra_info"].update(device=device, device_type=device_type)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(changed), encoding="utf-8")
        return path

    complete, newer = (
        write("a", "CPU A", "cpu", "2026-01-01", full),
        write("b", "CPU B", "cpu", "2026-02-01", 10),
    )
    cpus = readme.latest_of_each_device([newer, complete])
    assert [results.device for results in cpus] == ["CPU A", "CPU B"]
    old, new = (write(f"g{month}", f"GPU {month}", "cuda", f"2026-0{month}-01", 10) for month in (3, 4))
    devices = readme.latest_of_each_device([newer, new, complete, old])
    assert [results.device for results in devices] == ["GPU 4", "GPU 3", "CPU A", "CPU B"]
    line = readme._line(cpus[1])
    assert line.startswith("CPU B, torch ")
    assert "InfoNCE + ATP + CU, N = 4096" in line
    assert "authors' formulation" in line
    assert line.endswith("([all rows](benchmarks/results/b.json))")
