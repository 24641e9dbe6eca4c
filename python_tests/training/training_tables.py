"""Tables of committed training results, as README and notes show them between two markers.

    python python_tests/training/training_tables.py

A document that holds `<!-- training:NAME:begin -->` and `<!-- training:NAME:end -->` gets the table of
`benchmarks/results/training/NAME.json` between them; nothing else changes. `NAME paper` in the markers adds
the paper's rows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gapkernels.benchmark_report.tables import markdown
from gapkernels.training.results import Statistic, table_rows

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "training"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"<!-- training:(([\w-]+)( paper)?):begin -->\n.*?<!-- training:\1:end -->", flags=re.DOTALL)


def table(content: dict[str, Any], with_paper: bool = False) -> str:
    """Return a Markdown table: methods, or methods and batch sizes where there are several."""
    experiments = content["experiments"]
    lines: list[list[str]] = []
    for experiment in experiments:
        summary = {
            method: {key: Statistic(value["mean"], value["std"]) for key, value in run["metrics"].items()}
            for method, run in experiment["methods"].items()
        }
        heading, *rows = table_rows(summary, content["paper"] if with_paper else None)
        if len(experiments) > 1:
            heading = ["batch size", *heading]
            rows = [[str(experiment["batch_size"]), *row] for row in rows]
        lines += rows if lines else [heading, *rows]
    return markdown(lines)


def with_tables(text: str) -> str:
    """Return a document with the tables that its markers name."""

    def replace(match: re.Match[str]) -> str:
        content = json.loads((RESULTS / f"{match[2]}.json").read_text(encoding="utf-8"))
        lines = table(content, with_paper=match[3] is not None)
        return f"<!-- training:{match[1]}:begin -->\n{lines}\n<!-- training:{match[1]}:end -->"

    return _BLOCK.sub(replace, text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
