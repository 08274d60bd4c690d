# SPDX-License-Identifier: LGPL-2.1-or-later
"""The flash memory that UEFI and its variables are in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import nodes
from .device import Device, File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..hardware import Build


class Flash(Device, frozen=True, kw_only=True):
    """Both chips: a build of UEFI, which the guest can't change, and its variable store at `store`."""

    build: Build
    store: str

    def arguments(self) -> list[str]:
        build = self.build
        found: list[str] = []
        for name, path, kind, fixed in (
            ("firmware", build.program, build.program_format, True),
            ("nvram", self.store, build.template_format, False),
        ):
            common = {"node-name": name, "read-only": fixed}
            node = nodes.over(kind, nodes.file(path, **{"auto-read-only": False, "read-only": fixed}), None, **common)
            found += ["-blockdev", nodes.text(node)]
        # Options of -machine add to those given before.
        found += ["-machine", "pflash0=firmware,pflash1=nvram" + (",smm=on" if build.smm else "")]
        if build.smm:
            found += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
        return found

    def files(self) -> Iterator[File]:
        yield File(self.build.program, writes=False)
        yield File(self.store, writes=True)
