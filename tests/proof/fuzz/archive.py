# SPDX-License-Identifier: LGPL-2.1-or-later
"""Archives that become containers: whatever they hold, it stays in its directory, ends, and can be removed.

An input is the archive itself, or after "tree" a line for each member: its kind, a space, its name, a NUL, where it
leads; of these an archive is made, whose checksums are right.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import tempfile
import unittest.mock

from virtd import files
from virtd.drivers.lxc import create, unpack

SEEDS = (
    b"tree\n5 etc\n0 etc/hostname\n0 etc/machine-id\n",
    # What hung for ever, and what led out.
    b"tree\n5 etc\n6 etc/hostname\n6 etc/machine-id\n",
    b"tree\n2 etc\0../outside\n0 etc/hostname\n",
    b"tree\n5 etc\n2 etc/hostname\0../../outside/file\n2 etc/machine-id\0../../outside/file\n",
    b"tree\n5 etc\n1 etc/hostname\0../outside/file\n0 ../outside/file\n0 /outside\n2 a\0..\n0 a/outside/file\n",
    b"tree\n5 etc\n5 etc/hostname\n5 etc/machine-id\n0 etc/hostname/a\n",
    b"\x1f\x8b\x08\0", b"\xfd7zXZ\0", b"BZh9", b"\x28\xb5\x2f\xfd",
)  # fmt: skip
WORDS = (b"../", b"/", b"\0", b"etc", b"hostname", b"machine-id", b"outside", b"\n2 ", b"\n1 ", b"\n6 ", b"a/" * 90)
LIMIT = 4096
BRIEF = 60  # each is some processes


def target(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.mkdir(f"{directory}/outside")
        with open(f"{directory}/outside/file", "w") as file:
            file.write("outside")
        os.mkdir(f"{directory}/made")
        with tempfile.TemporaryFile() as archive:
            archive.write(packed(data.splitlines()[1:]) if data.startswith(b"tree\n") else data)
            archive.seek(0)
            job = unpack.Job(f"{directory}/made", "web1", [], create.option(data[:6]))
            with unittest.mock.patch.object(unpack, "WORDS", 0):
                unpack.run(job, archive.fileno())
        with open(f"{directory}/outside/file") as file:
            assert file.read() == "outside", "it was written to what is outside"
        assert sorted(os.listdir(directory)) == ["made", "outside"], os.listdir(directory)
        assert os.listdir(f"{directory}/outside") == ["file"]
        files.remove_tree(f"{directory}/made")
        assert not os.path.lexists(f"{directory}/made"), "it can't be removed"


def packed(lines: list[bytes]) -> bytes:
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for line in lines[:64]:
            kind, _, rest = line.partition(b" ")
            name, _, link = rest.partition(b"\0")
            member = tarfile.TarInfo(os.fsdecode(name) or "x")
            member.type, member.linkname = kind[:1] or b"0", os.fsdecode(link.replace(b"\0", b""))
            member.mode = 0o755
            member.uid, member.gid = os.geteuid(), os.getegid()
            # tar's own refusal of names is not what is looked for.
            with contextlib.suppress(ValueError, tarfile.TarError):
                tar.addfile(member)
    return found.getvalue()
