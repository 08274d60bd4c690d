#!/usr/bin/python3 -IS
# SPDX-License-Identifier: LGPL-2.1-or-later
"""As much of qemu-img as jobs call, on images that are a qcow2 header and nothing else."""

from __future__ import annotations

import os
import struct
import sys


def header(size: int) -> bytes:
    first = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 16, size, 0, 0, 0, 0, 0, 0, 0)
    return (first + struct.pack(">QQQII", 0, 0, 0, 4, 104)).ljust(4096, b"\0")


def write(path: str, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.pwrite(fd, header(size), 0)
    os.close(fd)


def main() -> int:
    verb, path = sys.argv[1], sys.argv[-1]
    if verb in ("create", "resize"):
        write(sys.argv[-2], int(path))
        return 0
    with open(path, "rb") as file:  # check
        return 0 if file.read(4) == b"QFI\xfb" else 2


if __name__ == "__main__":
    sys.exit(main())
