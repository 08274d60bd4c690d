# SPDX-License-Identifier: LGPL-2.1-or-later
"""The TPM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .device import Device, escape

if TYPE_CHECKING:
    from ....model.domain import TpmModel


class Tpm(Device, frozen=True, kw_only=True):
    """A TPM 2.0 of a certain `model`, emulated by the program at the other end of the socket at `path`.

    It has no address on a bus: the machine, a PC or not, has one place for it (QEMU's docs/specs/tpm.rst).
    """

    model: TpmModel
    pc: bool
    path: str

    def arguments(self) -> list[str]:
        name = f"tpm{self.number}"
        device = f"tpm-{self.model.value}" if self.pc else f"tpm-{self.model.value}-device"
        return [
            *("-chardev", f"socket,id=to-{name},path={escape(self.path)}"),
            *("-tpmdev", f"emulator,id=emulated-{name},chardev=to-{name}"),
            *("-device", f"{device},tpmdev=emulated-{name},id={name}"),
        ]
