# SPDX-License-Identifier: LGPL-2.1-or-later
"""The heads of images that somebody uploads or has imported: qcow2, with its snapshots, and what else is probed."""

from __future__ import annotations

import contextlib
import os
import struct

import msgspec

from virtd import errors
from virtd.drivers import qcow2

LIMIT = 8192


def header(
    *,
    version: int = 3,
    backing: bytes = b"",
    features: int = 0,
    method: int = 0,
    extensions: bytes = b"",
    snapshots: bytes = b"",
    count: int = 0,
) -> bytes:
    """An image of 512-byte clusters; `backing` at 400, the table of snapshots at 1024."""
    length = 104 if version == 3 else 72
    first = struct.pack(
        ">4sIQIIQIIQQIIQ", qcow2.MAGIC, version, 400 if backing else 0, len(backing), 9, 1 << 30, method, 1, 512,
        0, 0, count, 1024 if count else 0,
    )  # fmt: skip
    more = struct.pack(">QQQII", features, 0, 0, 4, length) if version == 3 else b""
    return ((first + more + extensions).ljust(400, b"\0") + backing).ljust(1024, b"\0") + snapshots


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")


def snapshot(name: bytes, extra: bytes = b"") -> bytes:
    raw = struct.pack(">QIHHIIQII", 4096, 1, 1, len(name), 1763000000, 0, 7, 100, len(extra)) + extra + b"1" + name
    return raw.ljust(-(-len(raw) // 8) * 8, b"\0")


SEEDS = (
    header(),
    header(version=2, backing=b"/srv/base.raw"),
    header(backing='json:{"driver":"nbd"}ä'.encode(), extensions=extension(0xE2792ACA, b"raw")),
    header(backing=b"\xff\xfe\xed\xa0\x80"),  # which is no text, and was once put into an answer
    header(features=4, extensions=extension(0x44415441, b"/etc/shadow")),
    header(features=2, method=2, extensions=extension(0x0537BE77, struct.pack(">QQ", 512, 1 << 21))),
    header(
        snapshots=snapshot(b"first") + snapshot("zweiter\u202e".encode(), struct.pack(">QQ", 1 << 40, 1 << 30)),
        count=2,
    ),
    header(snapshots=snapshot(b"\xff\n\x1b[31m"), count=65536),
    b"LUKS\xba\xbe\0\1aes".ljust(592, b"\0"),
    b"LUKS\xba\xbe\0\2" + struct.pack(">QQ", 1 << 14, 3) + bytes(500),
    b"KDMV" + bytes(508) + b'# Disk DescriptorFile\nRW 2048 FLAT "/etc/shadow" 0\n',
    b"vhdxfile" + bytes(100),
    b"",
)
WORDS = (
    qcow2.MAGIC, b"\xe2\x79\x2a\xca", b"DATA", b"\x05\x37\xbe\x77", b"json:", b"nbd:", b"/dev/fd/0", b"\xff" * 4,
    b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0\0\0\2", b"\0\0\0\3", b"\0\0\4\0", b"conectix", b"\x7f\x10\xda\xbe",
)  # fmt: skip


def target(data: bytes) -> None:
    fd = os.memfd_create("image")
    try:
        os.pwrite(fd, data, 0)
        probed = qcow2.probe(fd)
        assert probed == "qcow2" or not data.startswith(qcow2.MAGIC)
        with contextlib.suppress(errors.InvalidState):
            found = qcow2.read(fd, "image", snapshots=True)
            # What it says is told to clients, and held against what is on record.
            msgspec.json.encode(found)
            assert "\0" not in found.backing
            assert len(found.backing) <= 1023
            assert len(found.snapshots) <= len(data)
            assert found.data_file == (found.version == 3 and bool(data[79] & 4))
            assert qcow2.unusable(found) or not (found.data_file or found.encrypted or found.corrupt)
    finally:
        os.close(fd)
