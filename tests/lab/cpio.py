# SPDX-License-Identifier: LGPL-2.1-or-later
"""A cpio archive in the "newc" format that Linux reads as an initramfs (kernel: driver-api/early-userspace).

Written here because an archive with device nodes, made the same on every host by any user, needs no more than this.
"""

from __future__ import annotations

import stat


class Archive:
    """Entries in the order they are added; `finish` gives the archive's bytes. Owner 0:0, time 0, everywhere."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def _add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        numbers = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        for part in (header + encoded, data):
            self._parts.append(part + b"\0" * (-len(part) % 4))

    def directory(self, name: str) -> None:
        """A directory; its parent has to be there already."""
        self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file with its contents."""
        self._add(name, stat.S_IFREG | mode, data)

    def character_device(self, name: str, major: int, minor: int) -> None:
        """A character device of mode 0600."""
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """The archive, its trailer included."""
        self._add("TRAILER!!!", 0)
        return b"".join(self._parts)
