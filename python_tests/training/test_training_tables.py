"""README and notes show the figures of the committed training results."""

import statistics

import pytest
from training import training_tables


@pytest.mark.parametrize("document", training_tables.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_result_files(document: training_tables.Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert training_tables.with_tables(text) == text, "run: python python_tests/training/training_tables.py"


@pytest.mark.parametrize("path", sorted(training_tables.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_means_are_those_of_the_seeds(path: training_tables.Path) -> None:
    content = training_tables.json.loads(path.read_text(encoding="utf-8"))
    for experiment in content.get("experiments", [content]):
        for run in experiment.get("methods", {}).values():
            for metric in run["metrics"].values():
                assert len(metric["values"]) == len(run["seeds"])
                assert metric["mean"] == pytest.approx(statistics.fmean(metric["values"]), abs=1e-12)
                if len(run["seeds"]) > 1:
                    assert metric["std"] == pytest.approx(statistics.stdev(metric["values"]), abs=1e-12)


def test_a_table_has_a_line_per_method_and_batch_size() -> None:
    metric = {"mean": 0.5, "std": 0.25}
    experiment = {"methods": {"clip-ft": {"metrics": {"gap": metric, "v_measure": metric}}}}
    one = training_tables.table({"experiments": [{"batch_size": 8, **experiment}]})
    assert one.splitlines()[0] == "| method | gap ↓ | V-measure ↑ |"
    assert one.splitlines()[2:] == ["| clip-ft | 0.500 ± 0.250 | 0.500 ± 0.250 |"]
    two = training_tables.table({"experiments": [{"batch_size": size, **experiment} for size in (8, 16)]})
    assert [line.split(" | ")[0] for line in two.splitlines()[2:]] == ["| 8", "| 16"]


def test_the_papers_row_follows_ours() -> None:
    experiment = {"batch_size": 8, "methods": {"gap": {"metrics": {"gap": {"mean": 0.5, "std": None}}}}}
    content = {"paper": {"gap": {"gap": 0.09}}, "experiments": [experiment]}
    assert training_tables.table(content).splitlines()[2:] == ["| gap | 0.500 |"]
    assert training_tables.table(content, with_paper=True).splitlines()[2:] == [
        "| gap | 0.500 |",
        "| gap (paper) | 0.090 |",
    ]
