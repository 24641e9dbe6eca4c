import json
import shutil
import statistics
from pathlib import Path

import pytest

from gapkernels.errors import UserError
from gapkernels.training.layout import CONFIG, METRICS, RESULT, run_folder
from gapkernels.training.results import (
    Statistic,
    format_table,
    load_experiment,
    summarise,
    table_columns,
    table_rows,
    write_summary,
)


def final_values(folder: Path, method: str, key: str) -> list[float]:
    return [json.loads((run_folder(folder, method, seed) / RESULT).read_text())["metrics"][key] for seed in (0, 1)]


def test_the_table_holds_mean_and_deviation_over_seeds(finished: Path) -> None:
    rows = table_rows(summarise(load_experiment(finished)))
    assert rows[0] == [
        *("method", "gap ↓", "true-pair cosine ↑", "image → text R@1 ↑", "text → image R@1 ↑"),
        *("V-measure ↑", "kNN ↑", "linear probe ↑"),
    ]
    assert [row[0] for row in rows[1:]] == ["clip-lt", "gap"]
    for row in rows[1:]:
        for column, key in ((1, "gap"), (3, "image_to_text/R@1"), (5, "v_measure")):
            values = final_values(finished, row[0], key)
            assert row[column] == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def test_one_seed_has_no_deviation() -> None:
    assert str(Statistic.of([0.5])) == "0.500"
    assert str(Statistic.of([0.4, 0.6])) == "0.500 ± 0.141"


def test_columns_follow_the_modalities() -> None:
    keys = ["knn", "a_to_t/R@1", "a_to_t/R@5", "t_to_a/R@1", "b_to_t/R@1", "t_to_b/R@1", "gap", "uniformity/a"]
    assert list(table_columns(keys)) == ["gap", "a_to_t/R@1", "t_to_a/R@1", "b_to_t/R@1", "t_to_b/R@1", "knn"]


def test_columns_of_the_table_line_up() -> None:
    text = format_table([["method", "gap ↓"], ["clip-lt", "0.1"], ["gap", "0.25"]])
    assert text.splitlines() == ["method   gap ↓", "-------  -----", "clip-lt  0.1", "gap      0.25"]


def test_the_summary_holds_every_value(finished: Path) -> None:
    summary = json.loads(write_summary(load_experiment(finished)).read_text())
    assert list(summary["methods"]) == ["clip-lt", "gap"]
    gap = summary["methods"]["gap"]
    assert gap["seeds"] == [0, 1]
    assert gap["metrics"]["gap"]["values"] == final_values(finished, "gap", "gap")
    assert gap["metrics"]["gap"]["mean"] == statistics.fmean(gap["metrics"]["gap"]["values"])
    assert summary["config"]["name"] == "digits"
    assert summary["environment"]["gapkernels"]


def test_unfinished_runs_are_left_out(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (run_folder(folder, "gap", 1) / RESULT).unlink()
    assert [(run.method, run.seed) for run in load_experiment(folder).runs] == [
        ("clip-lt", 0),
        ("clip-lt", 1),
        ("gap", 0),
    ]


def test_what_cannot_be_read_is_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        load_experiment(tmp_path)
    shutil.copy(finished / CONFIG, tmp_path)
    with pytest.raises(UserError, match="holds no finished run yet"):
        load_experiment(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (run_folder(folder, "gap", 0) / METRICS).write_text('{"step": 1')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        load_experiment(folder)
