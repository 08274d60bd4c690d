#!/usr/bin/python3 -IS
# SPDX-License-Identifier: LGPL-2.1-or-later
"""As much of qemu-img as jobs call, on images that are a qcow2 header and nothing else."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys

ENDLESS = 3 << 29  # the size of an image that is never finished


def header(size: int, backing: bytes = b"") -> bytes:
    where = 112 if backing else 0
    first = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, where, len(backing), 16, size, 0, 0, 0, 0, 0, 0, 0)
    return ((first + struct.pack(">QQQII", 0, 0, 0, 4, 104)).ljust(112, b"\0") + backing).ljust(4096, b"\0")


def write(path: str, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.pwrite(fd, header(size), 0)
    os.close(fd)


def named(name: str) -> str:
    """The file that a name of qemu-img's stands for."""
    return str(json.loads(name[5:])["file"]["filename"]) if name.startswith("json:") else name


def main() -> int:
    verb = sys.argv[1]
    if verb == "create" and int(sys.argv[-1]) == ENDLESS:
        os.write(1, b"    (0.00/100%)\r")
        signal.pause()
    if verb in ("create", "resize"):
        write(named(sys.argv[-2]), int(sys.argv[-1]))
        return 0
    with open(named(sys.argv[-1]), "rb") as file:  # check
        return 0 if file.read(4) == b"QFI\xfb" else 2


if __name__ == "__main__":
    sys.exit(main())
