"""Which module imports which: no two of them each other, not even inside of a function."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imports(package: str) -> dict[str, set[str]]:
    """Names of a package's modules, and of those that each of them imports."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / package).rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                # `from package import module` names the module, `from package.module import name` does not.
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in modules else node.module for name in inner}
        found[module] = (names & modules.keys()) - {module}
    return found


@pytest.mark.parametrize("package", ["benchmarks", "gapkernels"])
def test_no_module_imports_itself_through_others(package: str) -> None:
    graph = imports(package)
    assert len(graph) > 2
    assert any(graph.values())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imported in a circle: {' -> '.join(error.args[1])}")


def test_the_compiler_is_not_imported_unasked() -> None:
    """torch._dynamo takes a second, of every process that only wants the loss."""
    unasked = "'torch._dynamo' in sys.modules"
    code = f"import sys, torch; assert not {unasked}; import gapkernels; print({unasked})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
