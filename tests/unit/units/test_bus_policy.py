# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bus policy, read by a real dbus-daemon: a mistake in it makes the bus ignore all of the file, silently."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from virtd.api import interfaces, kinds
from virtd.api.domain_objects import DOMAIN
from virtd.api.introspection import MANAGER
from virtd.connections import CLIENT_NAME
from virtd.host.access import Right
from virtd.systemd.bus import Bus

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

POLICY = Path(__file__).resolve().parents[3] / "units" / "org.virtd1.conf"

# What a system bus forbids at first, and our policy besides. Unlike <includedir>, <include> makes its errors fatal.
# A policy is only looked at for names that there are, so the bus can start an org.virtd1, which ends at once.
CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={directory}/bus</listen>
  <auth>EXTERNAL</auth>
  <servicedir>{directory}</servicedir>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <include>{policy}</include>
</busconfig>
"""
SERVICE = "[D-BUS Service]\nName=org.virtd1\nExec=/bin/false\n"

INTERFACES = kinds.members(kinds.load().values())

needs_bus = pytest.mark.skipif(shutil.which("dbus-daemon") is None, reason="dbus-daemon isn't here")


@pytest.mark.parametrize("interface", [name for name in INTERFACES if name.startswith("org.virtd1.")])
def test_strangers_may_call_what_reads(interface: str) -> None:
    """The policy and the table that the server goes by say the same."""
    allowed = {
        rule.get("send_member")
        for rule in ET.parse(POLICY).iterfind("policy[@context='default']/allow")
        if rule.get("send_interface") == interface
    }
    methods = INTERFACES[interface].methods.items()
    assert allowed == {name for name, method in methods if interfaces.operation(method.operation).right is Right.LOOK}


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    """The address of a bus of our own."""
    config = tmp_path / "bus.conf"
    config.write_text(CONFIG.format(directory=tmp_path, policy=POLICY))
    (tmp_path / "org.virtd1.service").write_text(SERVICE)
    # pytest's directories are the owner's alone.
    top = Path(tempfile.gettempdir())
    for directory in (tmp_path, *(parent for parent in tmp_path.parents if top in parent.parents)):
        directory.chmod(directory.stat().st_mode | 0o011)
    with subprocess.Popen(
        ["dbus-daemon", "--nofork", "--print-address", f"--config-file={config}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as daemon:
        assert daemon.stdout is not None
        said = daemon.stdout.readline()
        try:
            assert said.startswith("unix:path="), said + daemon.stdout.read()
            yield said.partition(",")[0].strip()
        finally:
            daemon.terminate()
            # It says that org.virtd1 didn't start.
            daemon.stdout.read()


@needs_bus
@pytest.mark.skipif(shutil.which("busctl") is None, reason="busctl isn't here")
@pytest.mark.skipif(os.getuid() != 0, reason="only root can call as somebody else")
def test_who_may_call_what(bus: str) -> None:
    """A call that the policy lets through fails too here, but for another reason."""
    properties = "org.freedesktop.DBus.Properties"
    for user, interface, member, allowed in (
        ("root", MANAGER, "Define", True),
        ("nobody", MANAGER, "Define", False),
        ("nobody", MANAGER, "List", True),
        ("nobody", DOMAIN, "Info", True),
        ("nobody", DOMAIN, "Stop", False),
        ("nobody", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", True),
        ("nobody", properties, "GetAll", True),
        ("nobody", properties, "Set", False),
    ):
        called = subprocess.run(
            ["busctl", f"--address={bus}", "--timeout=20", "call", "org.virtd1", "/org/virtd1", interface, member],
            user=user,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        said = f"{user} {interface}.{member}: {called.stdout}"
        assert called.returncode != 0, said
        assert "connected" not in called.stdout, said
        assert ("denied" not in called.stdout) is allowed, said


@needs_bus
@pytest.mark.filterwarnings("ignore::ImportWarning")
@pytest.mark.skipif(shutil.which("dbus-send") is None, reason="dbus-send isn't here")
@pytest.mark.skipif(os.getuid() != 0, reason="only root can send as somebody else")
@pytest.mark.parametrize("name", ["org.virtd1", CLIENT_NAME])
def test_signals_are_roots(bus: str, name: str) -> None:
    """To all, as systemd's are, and to virtd itself; nobody's of either kind."""

    async def main() -> None:
        ours = await Bus.open(bus)
        seen: list[Any] = []
        await ours.subscribe(None, "org.example", None, None, lambda *signal: seen.append(signal[3][0]))
        await ours.own_name(name)
        for user in ("nobody", "root"):
            for to in ("", f"--dest={name}", f"--dest={ours.unique_name}"):
                command = ["dbus-send", f"--bus={bus}", "--type=signal", *filter(None, [to])]
                command += ["/x", "org.example.Happened", f"string:{user}{to}"]
                sent = await asyncio.to_thread(subprocess.run, command, user=user, stderr=subprocess.PIPE, timeout=60)
                assert sent.returncode == 0, sent
        await ours.flush()
        assert seen == ["root", f"root--dest={name}", f"root--dest={ours.unique_name}"]
        await ours.close()

    asyncio.run(main())
