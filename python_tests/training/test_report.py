import base64
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from gapkernels.training.layout import METRICS, PLOTS, run_folder
from gapkernels.training.plots import draw_plots
from gapkernels.training.report import write_report
from gapkernels.training.results import load_experiment, summarise, table_rows


class Elements(HTMLParser):
    """Collects every element with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.found if name == tag)


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    write_report([load_experiment(finished)], finished / "report.html")
    return (finished / "report.html").read_text(encoding="utf-8")


def test_the_report_needs_nothing_outside_itself(html: str) -> None:
    elements = Elements(html)
    for _, attributes in elements.found:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/png;base64,")
    assert {"link", "script", "iframe", "object"}.isdisjoint(tag for tag, _ in elements.found)
    assert "url(" not in html
    assert "@import" not in html
    assert not re.search(r"https?://", html)


def test_the_report_fits_a_phone(html: str) -> None:
    viewport = [meta["content"] for meta in Elements(html).named("meta") if meta.get("name") == "viewport"]
    assert viewport == ["width=device-width, initial-scale=1"]


def test_the_report_shows_table_settings_and_environment(html: str, finished: Path) -> None:
    text = Elements(html).text
    for row in table_rows(summarise(load_experiment(finished))):
        for cell in row:
            assert cell in text
    assert "temperature: 0.07  # temperature of the soft-max" in text
    assert "optional packages" in text
    assert "linear_probe/image" in text
    assert re.search(r"4 runs in \d+ s", text)


def test_every_figure_is_embedded_described_and_kept(html: str, finished: Path) -> None:
    images = list(Elements(html).named("img"))
    names = {path.stem for path in (finished / PLOTS).iterdir()}
    assert len(images) == len(names)
    assert {"summary", "gap", "v_measure", "info_nce", "terms-gap", "weights-gap"} <= names
    assert {f"space-{method}-by-{by}" for method in ("clip-lt", "gap") for by in ("modality", "class")} <= names
    for image in images:
        assert image["alt"]
        picture = Image.open(BytesIO(base64.b64decode((image["src"] or "").partition(",")[2])))
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10  # something was drawn


def test_names_are_escaped(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    environment = json.loads((folder / "environment.json").read_text())
    environment["platform"] = "<script>alert(1)</script>"
    (folder / "environment.json").write_text(json.dumps(environment))
    write_report([load_experiment(folder)], folder / "report.html")
    assert "<script>" not in (folder / "report.html").read_text()


def test_several_experiments_share_a_page(finished: Path, tmp_path: Path) -> None:
    experiment = load_experiment(finished)
    write_report([experiment, experiment], tmp_path / "new folder" / "both.html")
    assert (tmp_path / "new folder" / "both.html").read_text().count("<h1>gapkernels: digits</h1>") == 2


def test_plots_do_without_what_a_run_does_not_have(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "gap")
    for seed in (0, 1):
        log = run_folder(folder, "clip-lt", seed) / METRICS
        kept = [line for line in log.read_text().splitlines() if '"split": "test"' in line]
        log.write_text("\n".join(kept) + "\n")
    names = [plot.name for plot in draw_plots(load_experiment(folder))]
    assert "gap" in names
    assert "info_nce" not in names
    assert not any(name.startswith(("terms", "weights")) for name in names)


def test_the_logit_scale_is_drawn_only_where_it_is_learned(finished: Path) -> None:
    experiment = load_experiment(finished)
    assert "logit_scale" in {plot.name for plot in draw_plots(experiment)}
    fixed = {name: method for name, method in experiment.config.methods.items() if not method.learn_temperature}
    config = experiment.config.model_copy(update={"methods": fixed})
    runs = [run for run in experiment.runs if run.method in fixed]
    assert runs
    plots = draw_plots(dataclasses.replace(experiment, config=config, runs=runs))
    assert "logit_scale" not in {plot.name for plot in plots}
