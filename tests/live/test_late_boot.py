# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host on which a bridge, a disk and a mount come after virtd: what stands on them starts once they are there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import definition

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Lab

pytestmark = pytest.mark.live

LATE = "/srv/late"
NEXT_BOOT = (
    "systemctl stop virtd.socket virtd.service; rm -rf /run/virtd/autostarted /var/lib/virtd/autostarted "
    "/run/virtd/storage /run/virtd/network/*.json /run/virtd/qemu/*.json; systemctl start virtd.socket virtd.service"
)


@pytest.fixture
def late(lab: Lab) -> Iterator[Lab]:
    """A network on a bridge of the host's, a guest in it, a guest and a pool on a mount: all start at boot."""
    lab.sh(f"mkdir -p {LATE} && mount -t tmpfs -o mode=755 late {LATE} && mkdir -m 711 {LATE}/pool")
    lab.sh(f"truncate -s 1M {LATE}/disk.raw; chmod 600 {LATE}/disk.raw")
    lab.sh("ip link add br0 type bridge && ip link set br0 up")
    lab.virtdctl("network", "define", "-", stdin='name = "lan"\nmode = "bridge"\nbridge = "br0"\nautostart = true\n')
    lab.virtdctl("pool", "define", "-", stdin=f'name = "late"\npath = "{LATE}/pool"\nautostart = true\n')
    lab.virtdctl("pool", "start", "late")
    lab.virtdctl("pool", "stop", "late")
    for name, more in (
        ("innet", '[[nic]]\nnetwork = "lan"\n'),
        ("ondisk", f'[[disk]]\npath = "{LATE}/disk.raw"\nformat = "raw"\n'),
    ):
        lab.virtdctl("define", "-", stdin=definition(name, more=more))
        lab.virtdctl("autostart", name)
    lab.sh(f"umount {LATE}; ip link del br0")
    try:
        yield lab
    finally:
        for name in ("innet", "ondisk"):
            lab.virtdctl("stop", name, check=False)
        lab.virtdctl("pool", "stop", "late", check=False)
        lab.virtdctl("pool", "undefine", "late", check=False)
        lab.virtdctl("network", "stop", "lan", check=False)
        lab.sh(f"umount {LATE}; rm -rf {LATE}; ip link del br0", check=False)


def states(lab: Lab) -> dict[str, tuple[str, bool]]:
    rows: list[dict[str, Any]] = [*lab.json("list"), *lab.json("network", "list"), *lab.json("pool", "list")]
    return {row["name"]: (row["state"], row["waits"]) for row in rows}


def problems(lab: Lab) -> dict[str, dict[str, str]]:
    found = json.loads(lab.virtdctl("status", "--json", check=False).stdout)["problems"]
    return {row["object"]: row for row in found}


def test_what_comes_late(late: Lab) -> None:
    everything = {"qemu/innet", "qemu/ondisk", "network/lan", "storage/late"}
    waiting = {"innet": ("stopped", True), "ondisk": ("stopped", True), "lan": ("inactive", True)}
    waiting["late"] = ("inactive", True)
    late.sh(NEXT_BOOT)
    late.wait("all to wait", lambda: states(late) == waiting, 20)
    assert set(problems(late)) == everything
    assert "waits to be autostarted" in late.virtdctl("list").stdout
    assert late.sh(f"ls -A {LATE}") == "", "the pool was made below the mount point"
    assert "pool build" not in problems(late)["storage/late"]["hint"]
    # The next daemon knows of it at once.
    late.sh("systemctl restart virtd")
    assert set(problems(late)) == everything
    # One that is just being tried is "starting" for that moment.
    late.wait("all to wait on", lambda: states(late) == waiting, 20)
    # A person who starts one that can't be started is told why, and it waits on.
    assert late.virtdctl("network", "start", "lan", check=False).returncode == 1
    late.wait("the network to wait on", lambda: states(late)["lan"] == ("inactive", True), 20)

    late.sh("ip link add br0 type bridge && ip link set br0 up")
    late.wait("the network", lambda: states(late)["lan"] == ("active", False), 15)
    late.wait("the guest in it", lambda: states(late)["innet"] == ("running", False), 30)
    assert set(problems(late)) == {"qemu/ondisk", "storage/late"}
    late.sh(f"mount -t tmpfs -o mode=755 late {LATE} && mkdir -m 711 {LATE}/pool && truncate -s 1M {LATE}/disk.raw")
    late.wait("the pool", lambda: states(late)["late"] == ("active", False), 15)
    late.wait("the guest on it", lambda: states(late)["ondisk"] == ("running", False), 30)
    assert problems(late) == {}
    # It was once for this boot.
    late.virtdctl("stop", "ondisk")
    late.sh("systemctl restart virtd")
    assert states(late)["ondisk"] == ("stopped", False)


def test_a_mount_that_goes_is_told_of(late: Lab) -> None:
    late.sh(f"mount -t tmpfs -o mode=755 late {LATE} && mkdir -m 711 {LATE}/pool")
    late.virtdctl("pool", "start", "late")
    late.sh(f"umount {LATE} && systemctl reload virtd")
    assert LATE in problems(late)["storage/late"]["text"]
    refused = late.virtdctl("pool", "start", "late", check=False)
    assert refused.returncode == 1
    assert "isn't mounted" in refused.stderr
    assert late.sh(f"ls -A {LATE}") == ""
