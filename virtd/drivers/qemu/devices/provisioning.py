# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a guest's system gets what it is set up with; provisioning.py writes the files."""

from __future__ import annotations

from ... import nodes
from .device import Device, escape


class Seed(Device, frozen=True, kw_only=True):
    """The volume for cloud-init at `path`: a disk that can't be written.

    It isn't a CD-ROM: kernels for clouds have virtio's drivers, and often none for IDE and SATA.
    """

    path: str

    def arguments(self) -> list[str]:
        name, common = f"seed{self.number}", {"read-only": True}
        file = nodes.file(self.path, **{"node-name": f"{name}file"}, **common)
        disk = nodes.over("raw", f"{name}file", None, **{"node-name": name}, **common)
        device = f"virtio-blk-pci,drive={name},id=virtio-{name}{self.address}"
        return ["-blockdev", nodes.text(file), "-blockdev", nodes.text(disk), "-device", device]


class Credentials(Device, frozen=True, kw_only=True):
    """systemd's credentials, in a structure of the SMBIOS tables, at `path`."""

    path: str

    def arguments(self) -> list[str]:
        return ["-smbios", f"file={escape(self.path)}"]


class Ignition(Device, frozen=True, kw_only=True):
    """Ignition's configuration at `path`, where its provider "qemu" looks for it."""

    path: str

    def arguments(self) -> list[str]:
        return ["-fw_cfg", f"name=opt/com.coreos/config,file={escape(self.path)}"]
