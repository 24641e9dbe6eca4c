"""The Python in the documents runs, and the links between them lead somewhere."""

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from oracle import DEVICE

from gapkernels import ContrastOptions
from gapkernels.backends.contract import SUMS_OF
from gapkernels.backends.cpu.backend import CpuBackend
from gapkernels.backends.tiled import TiledBackend

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run(document, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    if document.name == "README.md":
        assert blocks
    monkeypatch.chdir(tmp_path)
    image, text, audio = (torch.randn(16, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    scale = torch.tensor(10.0, device=DEVICE, requires_grad=True)
    namespace = {"torch": torch, "image": image, "text": text, "audio": audio, "scale": scale}
    absent = set()
    for block in blocks:
        optional = r"^(?:import|from) (lightning|sentence_transformers|transformers)\b"
        others = re.findall(optional, block, flags=re.MULTILINE)
        missing = {name for name in others if importlib.util.find_spec(name) is None}
        if not missing:
            exec(compile(block, document.name, "exec"), namespace)
        absent |= missing
    if absent:
        pytest.skip(f"not all blocks run: {', '.join(sorted(absent))} not installed")


def test_the_import_swap_is_what_it_says():
    """The InfoNCE of the README's before is a term of its after."""
    readme = (ROOT / "README.md").read_text()
    swap = re.search(r"^```diff\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL).group(1)
    before, after = ("\n".join(line[2:] for line in swap.splitlines() if line.startswith(sign)) for sign in "-+")
    names = {"torch": torch, "F": torch.nn.functional, "image": torch.randn(16, 8), "text": torch.randn(16, 8)}
    exec(before, names)
    info_nce = names["loss"]
    exec(after.replace("temperature=0.07", "temperature=0.07, return_terms=True"), names)
    torch.testing.assert_close(names["loss"].info_nce, info_nce)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_files(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def site():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages_of(nav):
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for below in entry.values():
                yield from pages_of([below] if isinstance(below, str) else below)


def test_every_document_has_one_place_on_the_site():
    outside = site()["extra"]["pages"]
    assert all((ROOT / source).is_file() for source in outside)
    inside = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages_of(site()["nav"])) == sorted([*inside, *outside.values()])


def test_api_pages_name_what_exists():
    names = [
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    ]
    assert names
    for name in names:
        pkgutil.resolve_name(name)


def test_the_architecture_names_rooms_that_exist():
    architecture = (ROOT / "docs" / "architecture.md").read_text()
    rooms = re.findall(r"^\| (`[^|]+) \|", architecture, flags=re.MULTILINE)
    assert len(rooms) > 10
    for room in re.findall(r"`([^`]+)`", " ".join(rooms)):
        assert (ROOT / room).exists(), room


def test_which_loss_says_what_backends_have():
    """The table of the page, and the backends' own word."""
    page = (ROOT / "docs" / "which-loss.md").read_text()
    heading, *lines = re.search(r"^\| needed for .*?(?=\n\n)", page, re.M | re.S).group(0).splitlines()
    names = re.findall(r"\| `(\w+)`", heading)
    assert names == ["torch", "cpu"]
    said = {name: set() for name in names}
    rows = [re.split(r" \| ", line.strip("| ")) for line in lines[1:]]
    assert {row[1].strip("`") for row in rows} == SUMS_OF
    for row in rows:
        for name, answer in zip(names, row[2:], strict=True):
            assert answer in ("yes", "no")
            said[name] |= {row[1].strip("`")} if answer == "yes" else set()
    assert said == {"torch": TiledBackend.sums_of, "cpu": CpuBackend.sums_of}


def test_which_loss_names_every_option():
    page = (ROOT / "docs" / "which-loss.md").read_text()
    for option in ContrastOptions.__annotations__:
        assert f"`{option}" in page, option
