# SPDX-License-Identifier: LGPL-2.1-or-later
"""No module imports itself by way of others. Imports for type checkers count: who needs a type knows its module."""

from __future__ import annotations

import pytest

from tests.unit.test_layers import IMPORTS, MODULES

Graph = dict[str, set[str]]


def graph() -> Graph:
    found: Graph = {name: set() for name in MODULES}
    for one in IMPORTS:
        if one.imported in MODULES:
            found[one.importer].add(one.imported)
    return found


def reach(start: str, imported: Graph) -> set[str]:
    """All that `start` imports, directly or not; itself only if it is in a circle."""
    found: set[str] = set()
    ahead = list(imported[start])
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += imported[name]
    return found


def circles(imported: Graph) -> list[tuple[str, ...]]:
    """The largest sets of modules each of which imports all the others, directly or not."""
    reached = {name: reach(name, imported) for name in imported}
    return sorted(
        {
            tuple(sorted(other for other in found if name in reached[other]))
            for name, found in reached.items()
            if name in found
        }
    )


def described(circle: tuple[str, ...], imported: Graph) -> str:
    return "\n".join(
        f"{name} imports {other}" for name in circle for other in sorted(imported[name].intersection(circle))
    )


def test_there_are_no_circles() -> None:
    imported = graph()
    found = circles(imported)
    assert not found, "\n\n".join(described(circle, imported) for circle in found)


@pytest.mark.parametrize(
    ("imported", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, [("b", "c")]),
        ({"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d"}}, [("a", "b", "c"), ("d", "e")]),
        ({"a": {"a"}}, [("a",)]),
    ],
)
def test_circles_are_found(imported: Graph, found: list[tuple[str, ...]]) -> None:
    assert circles(imported) == found
