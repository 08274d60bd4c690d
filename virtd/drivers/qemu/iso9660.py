# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small ISO 9660 volume, for cloud-init's few files: no program has to be installed and run for that.

ECMA-119 describes it. There are two trees of the same files: one with upper-case names, as it has them, which Linux
shows in lower case, and one with the names as they are, by Joliet, for all other systems. Each has its root directory
only.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

SECTOR = 2048
SYSTEM = 16  # sectors that are left to boot loaders, before the descriptors
TREE = 3  # sectors of a tree: its path table in either byte order, and its directory
DIRECTORY = 2  # a flag
DATE = bytes((100, 1, 1, 0, 0, 0, 0))  # the start of 2000: the same files make the same volume
NO_DATE = b"0" * 16 + b"\0"


class _Tree(NamedTuple):
    """One of the two. `at`: its first sector; `escape`: the sequence that selects its characters."""

    kind: int
    at: int
    encoding: str
    escape: bytes = b""

    @property
    def directory(self) -> int:
        return self.at + 2

    def name(self, name: str) -> bytes:
        """A file's name, with its version."""
        return (f"{name};1" if self.escape else f"{name.upper()}.;1").encode(self.encoding)

    def text(self, text: str, width: int) -> bytes:
        """A field, filled up with blanks."""
        return (text + " " * width).encode(self.encoding)[:width]


PLAIN = _Tree(1, SYSTEM + 3, "ascii")
JOLIET = _Tree(2, PLAIN.at + TREE, "utf-16-be", b"%/E")
FILES = JOLIET.at + TREE


def image(label: str, files: Mapping[str, bytes]) -> bytes:
    """The volume. Names are of lower-case letters, digits and '-', up to 28, and all together fit in one sector."""
    found: list[tuple[str, int, int]] = []
    at, contents = FILES, b""
    for name, content in sorted(files.items()):
        found.append((name, at, len(content)))
        contents += _padded(content)
        at = FILES + len(contents) // SECTOR
    terminator = _padded(struct.pack("B5sB", 255, b"CD001", 1))
    trees = (PLAIN, JOLIET)
    return b"".join(
        (
            bytes(SYSTEM * SECTOR),
            *(_descriptor(tree, label, at) for tree in trees),
            terminator,
            *(_tables(tree, found) for tree in trees),
            contents,
        )
    )


def _descriptor(tree: _Tree, label: str, sectors: int) -> bytes:
    """Of a volume (8.4 and 8.5 in ECMA-119). Nobody is named as its author."""
    little, big = _path_table(tree, "<"), tree.at + 1
    return _padded(
        b"".join(
            (
                struct.pack("B5sBx", tree.kind, b"CD001", 1),
                tree.text("", 32),
                tree.text(label, 32),
                bytes(8),
                _both("I", sectors),
                tree.escape.ljust(32, b"\0"),
                _both("H", 1) * 2,  # one volume, and this is the first
                _both("H", SECTOR),
                _both("I", len(little)),
                struct.pack("<II", tree.at, 0),
                struct.pack(">II", big, 0),
                _record(b"\0", tree.directory, SECTOR, DIRECTORY),
                tree.text("", 128) * 4,
                tree.text("", 37) * 3,
                NO_DATE * 4,
                b"\1",
            )
        )
    )


def _tables(tree: _Tree, files: list[tuple[str, int, int]]) -> bytes:
    """The sectors of a tree."""
    records = [_record(name, tree.directory, SECTOR, DIRECTORY) for name in (b"\0", b"\1")]  # itself, and above it
    records += [_record(tree.name(name), at, size) for name, at, size in files]
    return b"".join(map(_padded, (_path_table(tree, "<"), _path_table(tree, ">"), b"".join(records))))


def _path_table(tree: _Tree, order: str) -> bytes:
    """The root directory alone, which is its own parent."""
    return struct.pack(f"{order}BBIHBx", 1, 0, tree.directory, 1, 0)


def _record(name: bytes, at: int, size: int, flags: int = 0) -> bytes:
    """An entry of a directory (9.1 in ECMA-119), of an even length."""
    length = 33 + len(name) + 1 & ~1
    head = struct.pack("BB", length, 0) + _both("I", at) + _both("I", size) + DATE
    return (head + struct.pack("BBB", flags, 0, 0) + _both("H", 1) + bytes((len(name),)) + name).ljust(length, b"\0")


def _both(kind: str, value: int) -> bytes:
    """A number in both byte orders."""
    return struct.pack(f"<{kind}", value) + struct.pack(f">{kind}", value)


def _padded(data: bytes) -> bytes:
    """Filled up to whole sectors."""
    return data + bytes(-len(data) % SECTOR)
