# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading the header of a qcow2 image, and recognizing other formats.

The layout is QEMU's docs/interop/qcow2.txt. Every number may come from an attacker, so all reads
are bounded, and nothing is believed that doesn't fit into the file.
"""

from __future__ import annotations

import os
import struct

import msgspec

from .. import errors

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # up to and including snapshots_offset, 72 bytes
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_DATA_FILE = 1 << 2  # incompatible feature bit: the data is in another file
_CORRUPT = 1 << 1
_SNAPSHOTS_MAX = 65536
_LISTED_MAX = 1 << 20  # bytes of the snapshot table that are read

# Magic numbers of other formats, with their offsets; only examined on request.
_OTHERS = (
    (0, MAGIC, "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
)


class Snapshot(msgspec.Struct, frozen=True):
    """An internal snapshot. `at`: seconds since 1970; `state`: bytes of saved guest memory."""

    id: str
    name: str
    at: int
    state: int


class Header(msgspec.Struct, frozen=True):
    """`backing` is empty if there is none."""

    version: int
    size: int
    backing: str = ""
    corrupt: bool = False
    data_file: bool = False
    encrypted: bool = False
    snapshots: tuple[Snapshot, ...] = ()


def read(fd: int, name: str, *, snapshots: bool = False) -> Header:
    """The header of the open image; `name` is for errors. Raises InvalidState if it isn't a qcow2 image."""
    length = os.fstat(fd).st_size
    raw = os.pread(fd, 112, 0)
    if len(raw) < 72 or raw[:4] != MAGIC:
        raise _bad(name, "it doesn't begin as a qcow2 image does")
    (_, version, backing_at, backing_length, bits, size, encryption, _, _, _, _, count, snapshots_at) = (
        _HEADER.unpack_from(raw)
    )
    if version not in (2, 3):
        raise _bad(name, f"its version is {version}")
    if not 9 <= bits <= 21:
        raise _bad(name, f"its clusters have 2^{bits} bytes")
    features, header_length = 0, 72
    if version == 3:
        if len(raw) < 104:
            raise _bad(name, "its header is cut off")
        features = int.from_bytes(raw[72:80], "big")
        header_length = int.from_bytes(raw[100:104], "big")
    if not 72 <= header_length <= 1 << bits:
        raise _bad(name, f"its header has {header_length} bytes")
    backing = b""
    if backing_at:
        if backing_length > 1023 or backing_at + backing_length > 1 << bits:
            raise _bad(name, "the name of its backing file is outside the header")
        backing = os.pread(fd, backing_length, backing_at)
        if len(backing) != backing_length or b"\0" in backing:
            raise _bad(name, "the name of its backing file is cut off")
    try:
        name_of_backing = backing.decode()
    except UnicodeDecodeError:
        raise _bad(name, "the name of its backing file is no text") from None
    return Header(
        version=version,
        size=size,
        backing=name_of_backing,
        corrupt=bool(features & _CORRUPT),
        data_file=bool(features & _DATA_FILE),
        encrypted=encryption != 0,
        snapshots=_snapshots(fd, name, count, snapshots_at, length) if snapshots else (),
    )


def unusable(header: Header) -> str:
    """What in the header makes an image unusable; "" if nothing does.

    QEMU follows the header when it opens a data file or asks for a key, and no option overrides that.
    """
    if header.corrupt:
        return "it is marked as corrupt"
    if header.data_file:
        return "its data is in another file, which isn't supported"
    if header.encrypted:
        return "it is encrypted, which isn't supported"
    return ""


def _bad(name: str, why: str) -> errors.InvalidState:
    return errors.InvalidState(
        f"{name} is no usable qcow2 image: {why}", hint="It may be damaged, or of another format."
    )


def _snapshots(fd: int, name: str, count: int, at: int, length: int) -> tuple[Snapshot, ...]:
    if not count:
        return ()
    if count > _SNAPSHOTS_MAX or at >= length:
        raise _bad(name, "its list of snapshots is outside the file")
    raw = os.pread(fd, _LISTED_MAX, at)
    found, offset = [], 0
    for _ in range(count):
        if offset + _SNAPSHOT.size > len(raw):
            break
        _, _, id_length, name_length, seconds, _, _, _, _ = (fields := _SNAPSHOT.unpack_from(raw, offset))
        state, extra = _state(raw, offset, fields)
        start = offset + _SNAPSHOT.size + extra
        end = start + id_length + name_length
        if end > len(raw):
            break
        identifier = raw[start : start + id_length].decode(errors="replace")
        title = raw[start + id_length : end].decode(errors="replace")
        found.append(Snapshot(identifier, title, seconds, state))
        offset += -(-(end - offset) // 8) * 8
    return tuple(found)


def _state(raw: bytes, offset: int, fields: tuple[int, ...]) -> tuple[int, int]:
    """The sizes of a snapshot's guest memory and of its extra data, in which newer ones have a 64-bit size."""
    small, extra = fields[7], fields[8]
    if extra >= 8:
        at = offset + _SNAPSHOT.size
        return int.from_bytes(raw[at : at + 8], "big"), extra
    return small, extra


def probe(fd: int) -> str:
    """The format that the image seems to have, or "raw". A guest could fake it, so only a person may ask for it."""
    for offset, magic, name in _OTHERS:
        if os.pread(fd, len(magic), offset) == magic:
            return name
    return "raw"
