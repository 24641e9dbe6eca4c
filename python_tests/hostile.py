"""Files that somebody else wrote: any value at any place of a valid one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
# What generators seldom find, and what has crashed a program before.
NASTY = st.sampled_from(
    [
        *(math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -0.0, 0, -1, 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**30),
        *(10**400, True, None, "", " ", ".", "..", "../x", "/", "\0", "\n", "\x1b[2J", "$", "$\\frac", r"\frac{1}{2}"),
        *(
            "<script>",
            "_hidden",
            "é\u0301",
            "\N{GRINNING FACE}",
            "\u202e",
            "x" * 5000,
            "nan",
            "1e5",
            [],
            {},
            [[]],
            [None],
        ),
        *([1] * 50, {"": 0}, {"gap": math.nan}, [{}] * 3),
    ]
)
VALUES = JSON | NASTY

# Files are written and read in every example.
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in nested dictionaries and lists, the whole included."""
    yield path
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


@st.composite
def spoiled(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """Return a copy of a document in which one value is another one, is missing, or has company."""
    path = draw(st.sampled_from(list(places(tree))))
    if not path:
        return draw(values)
    changed = copy.deepcopy(tree)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if action == "replace":
        parent[path[-1]] = draw(values)
    elif action == "remove":
        del parent[path[-1]]
    elif isinstance(parent, dict):
        parent[draw(st.text(max_size=8))] = draw(values)
    else:
        parent.append(draw(values))
    return changed


def one_line(error: Exception, *names: str) -> None:
    """Raise unless a message is what a terminal prints as one line, and holds one of some names."""
    message = str(error)
    assert message.isprintable(), message
    assert 0 < len(message) < 3000
    assert not names or any(name in message for name in names), message
