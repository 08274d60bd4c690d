# SPDX-License-Identifier: LGPL-2.1-or-later
"""Devices that every guest has, or that are only switched on and off: monitors, console, random numbers, display."""

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

    A UART and not a virtconsole: when the pipe is full a UART makes the guest wait, while QEMU drops what a
    virtconsole writes (hw/char/virtio-console.c, flush_buf). That would be ten times as fast, but lose output.
    """

    def arguments(self) -> list[str]:
        return ["-chardev", "stdio,id=serial0,signal=off", "-serial", "chardev:serial0"]


class Panic(Device, frozen=True):
    """The device by which a guest's kernel reports a panic. It needs no address."""

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
