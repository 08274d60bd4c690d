# SPDX-License-Identifier: LGPL-2.1-or-later
"""Odd paths, and what systemd makes of its own files: `systemctl daemon-reload` changes no unit of virtd's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.harness import Lab
from tests.survival import containers as small

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

ODD = '/srv/it\'s "odd" 100% $HOME; a\\b ü'
# What a command's run or a process is, and no setting.
RUNS = ("ExecStart", "ExecStartEx", "ExecStop", "ExecStopEx", "CPUUsageNSec", "TasksCurrent", "MemoryCurrent",
        "MemoryPeak", "MemoryAvailable", "MemorySwapPeak", "NFileDescriptorStore")  # fmt: skip

MAKE = r"""
set -e; mkdir "$0"; cd "$0"; mkdir etc tmp usr proc sys dev run
for name in bin sbin lib lib64; do ln -sfn usr/$name $name; done
printf '#!/bin/sh\ntrap "exit 0" PWR TERM\necho up "$@"\nls /data\nwhile :; do sleep .2; done\n' >waits
chmod 755 . waits; touch ../da:ta/shown; chown -hR $1:$1 .
"""


@pytest.fixture
def odd(lab: Lab) -> Iterator[Lab]:
    """A directory with an odd name, which only root can reach."""
    lab.run("mkdir", "-p", ODD)
    lab.run("chmod", "700", ODD)
    yield lab
    for noun in ((), ("container",), ("network",)):
        for item in lab.json(*noun, "list"):
            if item["name"] != "default":
                lab.virtctl(*noun, "stop", item["name"], check=False)
                lab.virtctl(*noun, "undefine", item["name"], check=False)
    lab.run("rm", "-rf", ODD, "/srv/plain")


def units(lab: Lab) -> dict[str, dict[str, list[str]]]:
    """All settings of virtd's units that run. Their order means nothing."""
    names = lab.sh("systemctl list-units --plain --no-legend 'virtd-*.service' | cut -d' ' -f1").split()
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        settings = found.setdefault(name, {})
        for line in lab.sh(f"systemctl show --all {name}").splitlines():
            key, _, value = line.partition("=")
            if key not in RUNS:
                settings.setdefault(key, []).append(value)
    return {
        name: {key: sorted(" ".join(values).split()) for key, values in settings.items()}
        for name, settings in found.items()
    }


def reload_changes_nothing(lab: Lab, *names: str) -> None:
    before = units(lab)
    assert set(names) <= set(before)
    lab.sh("systemctl daemon-reload")
    after = units(lab)
    for name in names:
        assert after[name] == before[name]


def nothing_left(lab: Lab) -> None:
    lab.wait("no aliases", lambda: lab.sh("ls /run/virtd/paths") == "", 20)
    assert lab.json("fsck")["differences"] == []
    assert lab.virtctl("status", check=False).returncode == 0


def test_a_guest_with_odd_paths_ends_in_order_after_a_reload(odd: Lab) -> None:
    odd.run("cp", "/usr/share/virtd-lab/vmlinuz", f"{ODD}/vm linuz")
    odd.run("cp", "/usr/share/virtd-lab/initramfs.gz", f"{ODD}/init'rd")
    odd.run("truncate", "-s", "1M", f"{ODD}/disk:1.raw", f'{ODD}/c"d.iso')

    def path(name: str) -> str:
        return json.dumps(f"{ODD}/{name}", ensure_ascii=False)

    text = f"""name = "odd"
memory = "96M"
[boot]
kernel = {path("vm linuz")}
initrd = {path("init'rd")}
cmdline = "console=ttyS0 quiet x='a;b' $x %n"
[[disk]]
path = {path("disk:1.raw")}
[[cdrom]]
path = {path('c"d.iso')}
"""
    odd.virtctl("define", "-", stdin=text)
    odd.virtctl("start", "odd")
    odd.wait_ready("odd")
    reload_changes_nothing(odd, "virtd-qemu-odd.service")
    odd.sh("systemctl restart virtd.service; systemctl stop virtd-qemu-odd.service")
    info = odd.wait("its end", lambda: (i := odd.info("odd"))["exit"] and i, 30)
    assert (info["state"], info["exit"]["cause"], info["exit"]["signal"]) == ("stopped", "host-shutdown", None)
    nothing_left(odd)


def test_a_container_with_odd_paths_ends_in_order_after_a_reload(odd: Lab) -> None:
    root = f"{ODD}/root"
    odd.run("mkdir", f"{ODD}/da:ta")
    odd.run("sh", "-c", MAKE, root, str(small.FIRST))
    text = f"""name = "odd"
rootfs = {json.dumps(root, ensure_ascii=False)}
command = ["/waits", "a b", "$HOME;'"]
[[mount]]
source = "/usr"
target = "/usr"
readonly = true
[[mount]]
source = {json.dumps(f"{ODD}/da:ta", ensure_ascii=False)}
target = "/data"
"""
    odd.virtctl("container", "define", "-", stdin=text)
    odd.virtctl("container", "start", "odd")
    odd.wait("its words", lambda: b"shown" in odd.console("odd", noun="container"), 30)
    assert b"up a b $HOME;'" in odd.console("odd", noun="container")
    reload_changes_nothing(odd, "virtd-lxc-odd.service")
    odd.sh("systemctl stop virtd-lxc-odd.service")
    info = odd.wait("its end", lambda: (i := odd.json("container", "info", "odd"))["exit"] and i, 30)
    assert (info["state"], info["exit"]["cause"], info["exit"]["signal"]) == ("stopped", "host-shutdown", None)
    nothing_left(odd)


def test_pools_imports_and_containers_made_of_odd_paths(odd: Lab) -> None:
    odd.virtctl(
        "pool", "define", "-", stdin=f'name = "odd"\npath = {json.dumps(f"{ODD}/po ol", ensure_ascii=False)}\n'
    )
    odd.run("truncate", "-s", "1M", f"{ODD}/so'urce.raw")
    try:
        odd.virtctl("pool", "build", "odd", check=False)
        odd.virtctl("pool", "start", "odd", check=False)
        odd.virtctl("volume", "create", "odd", "a", "1M")
        odd.virtctl("volume", "create", "odd", "q.qcow2", "1M")
        odd.virtctl("volume", "clone", "odd", "a", "b")
        odd.virtctl("volume", "import", "odd", "c", f"{ODD}/so'urce.raw", "--from", "raw")
        assert {one["name"] for one in odd.json("volume", "list", "odd")} == {"a", "b", "c", "q.qcow2"}
    finally:
        for volume in ("a", "b", "c", "q.qcow2"):
            odd.virtctl("volume", "delete", "odd", volume, check=False)
        odd.virtctl("pool", "stop", "odd", check=False)
        odd.virtctl("pool", "undefine", "odd", check=False)
    odd.sh("mkdir -p '/srv/plain/an im'\\''age/etc'")
    odd.virtctl("container", "create", "made", "--image", "/srv/plain/an im'age")
    assert "made" in {one["name"] for one in odd.json("container", "list")}
    nothing_left(odd)


def test_a_reload_changes_no_unit(odd: Lab) -> None:
    """Neither one without anything odd in it: "RestrictNamespaces=" was lost."""
    odd.define("plain", start=True)
    odd.virtctl("network", "define", "-", stdin='name = "plain"\n[ipv4]\naddress = "192.168.150.1/24"\n')
    odd.virtctl("network", "start", "plain")
    odd.run("mkdir", "-p", "/odd: top %n")  # hidden from all of them
    try:
        odd.virtctl("stop", "plain")
        odd.virtctl("start", "plain")
        reload_changes_nothing(odd, "virtd-qemu-plain.service", "virtd-network-plain.service")
        odd.sh("systemctl stop virtd-qemu-plain.service")
        info = odd.wait("its end", lambda: (i := odd.info("plain"))["exit"] and i, 30)
        assert (info["state"], info["exit"]["cause"]) == ("stopped", "host-shutdown")
    finally:
        odd.run("rmdir", "/odd: top %n")
    nothing_left(odd)
