# SPDX-License-Identifier: LGPL-2.1-or-later
"""The advice in an error or a problem: text, and operations that each front end words for its users.

    "Start it first: " + do("start", "network", "lan") + "."

As text it has the words of virtdctl's users (virtd.wording); a front end with other users words the `parts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from . import wording

if TYPE_CHECKING:
    from collections.abc import Iterable


class Do(NamedTuple):
    """An operation. `noun` is the kind of object, "" for virtd itself; an option is True, or has a value."""

    verb: str
    noun: str = ""
    operands: tuple[str, ...] = ()
    options: tuple[tuple[str, str | bool], ...] = ()

    def __str__(self) -> str:
        return wording.operation(self.verb, self.noun, self.operands, dict(self.options))


class Option(NamedTuple):
    """An option of the operation that failed, or of the preceding one."""

    name: str

    def __str__(self) -> str:
        return wording.option(self.name)


class Advice:
    """Text and operations. It equals its own text, which is what records contain."""

    __slots__ = ("parts",)

    def __init__(self, *parts: str | Do | Option) -> None:
        self.parts = parts

    def __str__(self) -> str:
        return "".join(map(str, self.parts))

    def __repr__(self) -> str:
        return f"Advice{self.parts!r}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Advice | str) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __add__(self, other: Hint) -> Advice:
        return Advice(*self.parts, *_parts(other))

    def __radd__(self, other: str) -> Advice:
        return Advice(other, *self.parts)


Hint = str | Advice


def do(verb: str, noun: str = "", *operands: str, **options: str | bool) -> Advice:
    """An operation, by virtdctl's names: do("stop", "network", "lan", force=True)."""
    return Advice(Do(verb, noun, operands, tuple((name, value) for name, value in options.items() if value)))


def option(name: str) -> Advice:
    """An option, by itself."""
    return Advice(Option(name))


def joined(separator: str, found: Iterable[Hint]) -> Hint:
    """The parts with `separator` between them."""
    whole: Hint = ""
    for number, one in enumerate(found):
        whole = whole + separator + one if number else one
    return whole


def _parts(hint: Hint) -> tuple[str | Do | Option, ...]:
    return hint.parts if isinstance(hint, Advice) else (hint,)
