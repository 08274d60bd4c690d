# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ranges of IDs: free ones are found, and are free."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtd.drivers.ids import CONTAINERS, GUESTS, Range, free, grants

if TYPE_CHECKING:
    from pathlib import Path

TEN = Range("me", 100, 10)

# What others give out, with where that is written in `ids`' own docstring.
OTHERS = (
    Range("the system and people", 0, 60001),
    Range("homed, gdm, DynamicUser=, nobody", 60001, 5535),
    Range("subordinate IDs of useradd(8), old and new", 100000, 600100000 - 100000),
    Range("sssd(8)", 200000, 2000200000 - 200000),
    Range("foreign UIDs", 0x7FFE0000, 0x20000),
    Range("negative for some", 0x80000000, 0x80000000),
)


@pytest.mark.parametrize("other", [*OTHERS, CONTAINERS, Range("systemd-nspawn", 0x80000, 0x6FFF0000 - 0x80000)])
def test_guests_have_what_nobody_else_gives_out(other: Range) -> None:
    assert not other.meets(GUESTS.first, GUESTS.many)


def test_holding_and_meeting() -> None:
    assert TEN.last == 109
    assert TEN.holds(100, 10)
    assert not TEN.holds(100, 11)
    assert not TEN.holds(99)
    assert [first for first in range(90, 120) if TEN.meets(first, 5)] == list(range(96, 110))


@pytest.mark.parametrize(
    ("taken", "start", "expected"),
    [
        ([], None, 100),
        ([(100, 1)], None, 101),
        ([(90, 15)], None, 105),
        ([(100, 1)], 105, 105),
        ([(105, 5)], 105, 100),
        ([(101, 9)], 101, 100),
        ([(100, 10)], 103, None),
        ([(100, 9), (100, 1), (109, 1)], None, None),
        ([], 500, 100),
        ([(0, 1000)], None, None),
    ],
)
def test_free(taken: list[tuple[int, int]], start: int | None, expected: int | None) -> None:
    assert free(TEN, 1, [Range("other", *one) for one in taken], start=start) == expected


def test_free_in_steps() -> None:
    within = Range("me", 1000, 400)
    assert free(within, 100, [Range("other", 1001, 1)], step=100) == 1100
    assert free(within, 100, [Range("other", 1001, 1)]) == 1002
    assert free(within, 400, [Range("other", 1399, 1)], step=100) is None


@given(
    taken=st.lists(st.tuples(st.integers(80, 120), st.integers(1, 25)), max_size=8),
    count=st.integers(1, 11),
    step=st.integers(1, 4),
    start=st.none() | st.integers(95, 115),
)
def test_what_is_found_is_free_and_what_is_free_is_found(
    taken: list[tuple[int, int]], count: int, step: int, start: int | None
) -> None:
    others = [Range("other", *one) for one in taken]
    good = {
        at
        for at in range(100, 110, step)
        if TEN.holds(at, count) and not any(other.meets(at, count) for other in others)
    }
    found = free(TEN, count, others, start=start, step=step)
    assert found in good if good else found is None


def test_grants(tmp_path: Path) -> None:
    (tmp_path / "subuid").write_text("root:1000:10\n\n# who\nann:x:1\nann:5:0\nann:100000:65536\n")
    assert grants(str(tmp_path / "subuid")) == [Range("root", 1000, 10), Range("ann", 100000, 65536)]
    assert grants(str(tmp_path / "none")) == []
