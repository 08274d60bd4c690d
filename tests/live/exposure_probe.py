# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs inside a lab: units that are over in a moment as a rule, as they are but for a program that waits.

Prints what systemd-analyze security says of every unit of virtd's that is loaded: {unit: exposure}.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from typing import TYPE_CHECKING

from virtd.children import hardening
from virtd.drivers.lxc import sandbox as lxc
from virtd.drivers.storage import sandbox
from virtd.systemd.bus import Bus
from virtd.systemd.transient import UnitSpec
from virtd.systemd.units import Units

if TYPE_CHECKING:
    from virtd.children.hardening import Property

NO_STDIO = (os.devnull, os.devnull, os.devnull)


def kinds() -> dict[str, tuple[str, list[Property]]]:
    """By name: the user, and the properties."""
    toplevel = sorted(entry.name for entry in os.scandir("/") if entry.is_dir(follow_symlinks=False))
    return {
        "virtd-storage-probe-job.service": (
            "virtd-qemu",
            sandbox.properties([], ["/var/lib/virtd/images"], toplevel=toplevel),
        ),
        "virtd-storage-probe-device.service": (
            "virtd-qemu",
            sandbox.properties([], [], toplevel=toplevel, devices=["/dev/zero"]),
        ),
        "virtd-storage-probe-lvm.service": ("", sandbox.privileged()),
        "virtd-register-probe.service": ("", [*hardening.TOOL]),
        "virtd-create-lxc-probe.service": ("", lxc.making("/srv", "", toplevel=toplevel)),
        "virtd-exec-probe.service": ("", lxc.entering("/srv", privileged=False, toplevel=toplevel)),
    }


def analyzed() -> bytes:
    return subprocess.check_output(["systemd-analyze", "security", "--json=short", "--no-pager"])


async def main() -> None:
    bus = await Bus.open()
    units = Units(bus)
    started = kinds()
    try:
        for name, (user, properties) in started.items():
            argv = ("/bin/sleep", "100")
            spec = UnitSpec(name, "probe", "virtd.slice", argv, user=user, properties=tuple(properties))
            await units.start(spec, NO_STDIO)
        rows = json.loads(await asyncio.to_thread(analyzed))
        print(json.dumps({row["unit"]: float(row["exposure"]) for row in rows if row["unit"].startswith("virtd")}))
    finally:
        for name in started:
            await units.stop(name)
            await units.collect(name)
        await units.close()
        await bus.close()


asyncio.run(main())
