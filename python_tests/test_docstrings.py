"""Docstrings speak one dialect, the one that the API pages are made from: Google's sections in Markdown."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gapkernels"
MODULES = sorted(PACKAGE.rglob("*.py"))
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc|ref):`")
SINGULAR = re.compile(r"^\s*(?:Arg|Parameters?|Return|Raise|Attribute|Example|Yield):$", re.MULTILINE)


def docstrings(source: str) -> list[str]:
    """All docstrings, those of constants too."""
    bodies = [body for node in ast.walk(ast.parse(source)) if isinstance(body := getattr(node, "body", None), list)]
    values = [
        s.value.value for body in bodies for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)
    ]
    return [value for value in values if isinstance(value, str)]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_one_dialect(module):
    for text in docstrings(module.read_text()):
        assert not ROLE.search(text), f"the pages would show a Sphinx role as it stands: {text}"
        assert not SINGULAR.search(text), f"a section is called Args, Returns, Raises, Attributes or Examples: {text}"


def test_docstrings_are_found():
    assert docstrings('"""a"""\nX = 1\n"""b"""\ndef f():\n    """c"""\n') == ["a", "b", "c"]
