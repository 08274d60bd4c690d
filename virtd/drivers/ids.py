# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ranges of user and group IDs: their owners, overlaps and gaps. Pure, except for `grants`.

The IDs of a host are divided up so that no two allocators ever assign the same one (UIDS-GIDS in
systemd's documentation; Debian's policy, 9.2.2; SUB_UID_MIN and SUB_UID_MAX of login.defs(5)):

    0 to 60000                  the system's and people's
    60001 to 65535              systemd-homed's, gdm's, systemd's DynamicUser=, nobody, and no ID at all
    65536 to 524287             nobody's by systemd; but useradd(8) grants subordinate IDs from 100000 on in places
    524288 to 0x6FFFFFFF        containers': systemd-nspawn's, and what subuid(5) grants; `CONTAINERS` is a part of it
    0x70000000 to 0x7FFDFFFF    nobody's by systemd; sssd(8) and FreeIPA give out 200000 to 2000200000 (0x7738A140)
    0x7FFE0000 to 0x7FFFFFFF    systemd's foreign UIDs, and none
    from 0x80000000             not to be used: some programs take IDs for signed

Each guest of QEMU's has one ID of `GUESTS`, for its user and its group alike; each container has a range of
`CONTAINERS`, or of what /etc/subuid grants to root. Whoever assigns one checks all others
first, by `free`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Range(NamedTuple):
    """IDs `first` to `first` + `many` - 1, of `owner`, which is text for a person."""

    owner: str
    first: int
    many: int

    @property
    def last(self) -> int:
        return self.first + self.many - 1

    def holds(self, first: int, count: int = 1) -> bool:
        return self.first <= first and first + count <= self.first + self.many

    def meets(self, first: int, count: int = 1) -> bool:
        return self.first < first + count and first < self.first + self.many


# The defaults of qemu.first_uid and qemu.uid_count in virtd.toml: above what sssd assigns.
GUESTS = Range("virtd's guests", 0x78000000, 0x10000)
# Used if /etc/subuid grants root nothing: the upper part of what systemd leaves to containers, which useradd(8) never
# assigns to a person.
CONTAINERS = Range("virtd's containers", 0x60000000, 0x8000000)


def free(within: Range, count: int, taken: Iterable[Range], *, start: int | None = None, step: int = 1) -> int | None:
    """The first of `count` IDs of `within` that overlap none of `taken`; None if there are none.

    It is a multiple of `step` from the beginning of `within`. The search goes from `start` to the end, then from the
    beginning.
    """
    others = [other for other in taken if other.meets(within.first, within.many)]

    def aligned(at: int) -> int:
        return within.first + -(-(at - within.first) // step) * step

    def search(at: int, end: int) -> int | None:
        """Search from `at`, for a range that begins before `end`."""
        at = aligned(at)
        while at < end and within.holds(at, count):
            if not (in_the_way := [other.last for other in others if other.meets(at, count)]):
                return at
            at = aligned(max(in_the_way) + 1)
        return None

    beginning = within.first if start is None or not within.holds(start) else start
    found = search(beginning, within.last + 1)
    return found if found is not None or beginning == within.first else search(within.first, beginning)


def grants(path: str) -> list[Range]:
    """The entries of subuid(5) or subgid(5); invalid lines are left out."""
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                owner, _, rest = line.strip().partition(":")
                first, _, count = rest.partition(":")
                if owner and first.isdecimal() and count.isdecimal() and int(count):
                    found.append(Range(owner, int(first), int(count)))
    except OSError:
        pass
    return found
