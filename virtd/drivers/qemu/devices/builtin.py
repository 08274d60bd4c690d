# SPDX-License-Identifier: LGPL-2.1-or-later
"""What comes with every guest, or is only switched on and off: monitors, console, random numbers, a screen."""

from __future__ import annotations

from .device import Device, escape


class Monitor(Device, frozen=True, kw_only=True):
    """A QMP monitor called `name` on the socket at `path`."""

    name: str
    path: str

    def arguments(self) -> list[str]:
        chardev = f"socket,id={self.name},path={escape(self.path)},server=on,wait=off"
        return ["-chardev", chardev, "-mon", f"chardev={self.name},mode=control"]


class Console(Device, frozen=True):
    """The serial port, at QEMU's standard input and output.

    A UART and no virtconsole: when the pipe is full a UART makes the guest wait, while QEMU drops what a virtconsole
    writes then (hw/char/virtio-console.c, flush_buf). Ten times as fast, and not worth a byte.
    """

    def arguments(self) -> list[str]:
        return ["-chardev", "stdio,id=serial0,signal=off", "-serial", "chardev:serial0"]


class Panic(Device, frozen=True):
    """Through which a guest's kernel says that it has panicked. It is on no bus that has addresses."""

    def arguments(self) -> list[str]:
        return ["-device", "pvpanic"]


class Rng(Device, frozen=True):
    """A source of random numbers."""

    def arguments(self) -> list[str]:
        source = f"rng-random,id=rng{self.number},filename=/dev/urandom"
        return ["-object", source, "-device", f"virtio-rng-pci,rng=rng{self.number}{self.address}"]


class Display(Device, frozen=True, kw_only=True):
    """A VGA, shown by VNC on the socket at `path`."""

    path: str

    def arguments(self) -> list[str]:
        return ["-device", f"VGA{self.address}", "-vnc", f"unix:{escape(self.path)}"]
