# SPDX-License-Identifier: LGPL-2.1-or-later
"""Odd paths, and what systemd makes of its own files: `systemctl daemon-reload` changes no unit of virtd's."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from tests.harness import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

FIRST = 0x62000000  # IDs of which no other test has any
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
                lab.virtdctl(*noun, "stop", item["name"], check=False)
                lab.virtdctl(*noun, "undefine", item["name"], check=False)
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


@contextlib.contextmanager
def odd_top(lab: Lab) -> Iterator[None]:
    """A directory in / that has to be hidden from everything."""
    lab.run("mkdir", "-p", "/odd: top %n")
    try:
        yield
    finally:
        lab.run("rmdir", "/odd: top %n")


def nothing_left(lab: Lab) -> None:
    lab.wait("no aliases", lambda: lab.sh("ls /run/virtd/paths") == "", 20)
    assert lab.json("fsck")["differences"] == []
    assert lab.virtdctl("status", check=False).returncode == 0


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
    odd.virtdctl("define", "-", stdin=text)
    odd.virtdctl("start", "odd")
    odd.wait_ready("odd")
    reload_changes_nothing(odd, "virtd-qemu-odd.service")
    odd.sh("systemctl restart virtd.service; systemctl stop virtd-qemu-odd.service")
    info = odd.wait("its end", lambda: (i := odd.info("odd"))["exit"] and i, 30)
    assert (info["state"], info["exit"]["cause"], info["exit"]["signal"]) == ("stopped", "host-shutdown", None)
    nothing_left(odd)


def test_a_container_with_odd_paths_ends_in_order_after_a_reload(odd: Lab) -> None:
    root = f"{ODD}/root"
    odd.run("mkdir", f"{ODD}/da:ta")
    odd.run("sh", "-c", MAKE, root, str(FIRST))
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
    odd.virtdctl("container", "define", "-", stdin=text)
    odd.virtdctl("container", "start", "odd")
    odd.wait("its words", lambda: b"shown" in odd.console("odd", noun="container"), 30)
    assert b"up a b $HOME;'" in odd.console("odd", noun="container")
    reload_changes_nothing(odd, "virtd-lxc-odd.service")
    with odd_top(odd):
        assert odd.virtdctl("container", "exec", "-T", "odd", "--", "ls", "/data").stdout == "shown\n"
        assert odd.sh("ls -d /run/virtd/lxc/odd/exec*", check=False) == ""
    odd.sh("systemctl stop virtd-lxc-odd.service")
    info = odd.wait("its end", lambda: (i := odd.json("container", "info", "odd"))["exit"] and i, 30)
    assert (info["state"], info["exit"]["cause"], info["exit"]["signal"]) == ("stopped", "host-shutdown", None)
    nothing_left(odd)


def test_pools_imports_and_containers_made_of_odd_paths(odd: Lab) -> None:
    odd.virtdctl(
        "pool", "define", "-", stdin=f'name = "odd"\npath = {json.dumps(f"{ODD}/po ol", ensure_ascii=False)}\n'
    )
    odd.run("truncate", "-s", "1M", f"{ODD}/so'urce.raw")
    try:
        odd.virtdctl("pool", "build", "odd", check=False)
        odd.virtdctl("pool", "start", "odd", check=False)
        odd.virtdctl("volume", "create", "odd", "a", "1M")
        odd.virtdctl("volume", "create", "odd", "q.qcow2", "1M")
        odd.virtdctl("volume", "clone", "odd", "a", "b")
        odd.virtdctl("volume", "import", "odd", "c", f"{ODD}/so'urce.raw", "--from", "raw")
        odd.virtdctl("volume", "create", "odd", "top.qcow2", "--backing", "q.qcow2")
        assert {one["name"] for one in odd.json("volume", "list", "odd")} == {"a", "b", "c", "q.qcow2", "top.qcow2"}
        disks = "".join(f'[[disk]]\npool = "odd"\nvolume = "{name}"\n' for name in ("top.qcow2", "a"))
        odd.define("disks", more=disks, start=True)
        odd.wait_ready("disks")
        reload_changes_nothing(odd, "virtd-qemu-disks.service")
        odd.sh("systemctl stop virtd-qemu-disks.service")
        info = odd.wait("its end", lambda: (i := odd.info("disks"))["exit"] and i, 30)
        assert (info["state"], info["exit"]["cause"]) == ("stopped", "host-shutdown")
    finally:
        odd.virtdctl("stop", "disks", check=False)
        odd.virtdctl("undefine", "disks", check=False)
        for volume in ("a", "b", "c", "top.qcow2", "q.qcow2"):
            odd.virtdctl("volume", "delete", "odd", volume, check=False)
        odd.virtdctl("pool", "stop", "odd", check=False)
        odd.virtdctl("pool", "undefine", "odd", check=False)
    odd.sh("mkdir -p '/srv/plain/an im'\\''age/etc'")
    odd.write("/etc/virtd/virtd.toml", f"[lxc]\ndirectory = {json.dumps(ODD, ensure_ascii=False)}\n")
    try:
        odd.sh("systemctl restart virtd.service")
        odd.virtdctl("container", "create", "made", "--image", "/srv/plain/an im'age")
        assert odd.json("container", "info", "made")["rootfs"] == f"{ODD}/made"
        nothing_left(odd)
    finally:
        odd.sh("rm /etc/virtd/virtd.toml; systemctl restart virtd.service")


def test_a_reload_changes_no_unit(odd: Lab) -> None:
    """Neither one without anything odd in it: "RestrictNamespaces=" was lost."""
    odd.define("plain", start=True)
    odd.virtdctl("network", "define", "-", stdin='name = "plain"\n[ipv4]\naddress = "192.168.150.1/24"\n')
    odd.virtdctl("network", "start", "plain")
    with odd_top(odd):
        odd.virtdctl("stop", "plain")
        odd.virtdctl("start", "plain")
        reload_changes_nothing(odd, "virtd-qemu-plain.service", "virtd-network-plain.service")
        odd.sh("systemctl stop virtd-qemu-plain.service")
        info = odd.wait("its end", lambda: (i := odd.info("plain"))["exit"] and i, 30)
        assert (info["state"], info["exit"]["cause"]) == ("stopped", "host-shutdown")
    nothing_left(odd)


# As a pool has it, of what a lab can mount; it says which settings are others after a reload.
MOUNT = r"""
import asyncio, os, subprocess
from virtd.systemd import names, units
from virtd.systemd.bus import Bus
from virtd.drivers.storage import mounts
RUNS = ("ExecMount", "ExecUnmount", "SourcePath", "CPUUsageNSec", "TasksCurrent", "MemoryCurrent", "MemoryPeak")
def settings(name):
    lines = subprocess.run(["systemctl", "show", name], stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return {line for line in map(lambda line: " ".join(sorted(line.replace("=", "= ", 1).split())), lines)
            if not any(f"{key}=" in line for key in RUNS)}
async def main():
    bus = await Bus.open()
    systemd = units.Units(bus)
    for where in ("/srv/a b/m nt", "/srv/it's/\"q\" 100% %n $H", "/srv/back\\slash\\/x\\", "/srv/co:lon;/ü #x"):
        os.makedirs(where)
        await mounts.mount(systemd, "/dev/disk/by-label/my 'odd' \"label\" 100% %n $x", where, "tmpfs", "size=1M")
        before = settings(names.mount_unit(where))
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        print(*sorted(settings(names.mount_unit(where)) ^ before), sep="\n", end="")
        await mounts.unmount(systemd, where)
        assert mounts.mounted(where) is None
        os.removedirs(where)
    await systemd.close()
    await bus.close()
asyncio.run(main())
"""


def test_a_mount_with_odd_names(odd: Lab) -> None:
    odd.run("touch", "/srv/keep")
    odd.write("/root/mount.py", MOUNT)
    assert odd.sh("PYTHONPATH=/usr/lib/python3/dist-packages python3 /root/mount.py") == ""


# A directory that create takes for a root file system, with a file of somebody whom a directory service knows.
LARGE = """
mkdir -p {0}/etc {0}/usr; touch {0}/theirs; chown 70000:66000 {0}/theirs; tar -C {0} -cf {0}.tar .
"""


def test_large_ids_need_more_of_them(odd: Lab) -> None:
    image = "/srv/plain/image"
    odd.sh(LARGE.format(image))
    for source in (f"{image}.tar", image):
        done = odd.virtdctl("container", "create", "large", "--image", source, check=False)
        assert done.returncode == 1
        assert f"IDs up to 70000 are needed for the files of {source}" in done.stderr
        hint = next(line for line in done.stderr.splitlines() if line.startswith("Hint: "))
        assert odd.json("container", "list") == []
        odd.sh(hint.removeprefix("Hint: "))
        root = odd.json("container", "info", "large")["rootfs"]
        first = int(odd.sh(f"stat -c %u {root}"))
        assert odd.sh(f"stat -c %u:%g {root}/theirs").strip() == f"{first + 70000}:{first + 66000}"
        # A copy of a container's root has to have as many, or such files would be nobody's.
        done = odd.virtdctl("container", "create", "copy", "--image", root, check=False)
        assert "IDs up to 70000 are needed" in done.stderr
        odd.virtdctl("container", "create", "copy", "--ids", "131072", "--image", root)
        copied = odd.json("container", "info", "copy")["rootfs"]
        first = int(odd.sh(f"stat -c %u {copied}"))
        assert odd.sh(f"stat -c %u:%g {copied}/theirs").strip() == f"{first + 70000}:{first + 66000}"
        for name in ("large", "copy"):
            odd.virtdctl("container", "undefine", name)
        odd.sh(f"rm -rf {root} {copied}")
    nothing_left(odd)


HUNGRY = """
import ctypes, os, sys, time
os.setgid(54321); os.setuid(54321)
count = 0
while ctypes.CDLL(None).inotify_init1(0) >= 0:
    count += 1
print(count, flush=True)
time.sleep(1000)
"""


def test_no_inotify_instances_left_for_dnsmasq(odd: Lab) -> None:
    """Those of a user of the test's own, for the count is one for all labs."""
    odd.sh("groupadd -fg 54321 hungry; id hungry >/dev/null 2>&1 || useradd -Mu 54321 -g hungry hungry", check=False)
    odd.write("/etc/virtd/virtd.toml", '[dnsmasq]\nuser = "hungry"\n')
    odd.write("/root/hungry.py", HUNGRY)
    try:
        odd.sh("systemctl restart virtd.service; systemd-run -q --unit=hungry python3 /root/hungry.py")
        limit = int(odd.sh("cat /proc/sys/fs/inotify/max_user_instances"))
        odd.wait("all taken", lambda: str(limit) in odd.sh("journalctl -o cat -u hungry.service"), 30)
        for name, more in (("one", ""), ("two", 'mode = "isolated"\n')):
            text = f'name = "{name}"\n{more}[ipv4]\naddress = "192.168.{150 + len(more)}.1/24"\n'
            odd.virtdctl("network", "define", "-", stdin=text)
        done = odd.virtdctl("network", "start", "one", check=False)
        assert f"processes of hungry have {limit} inotify instances" in done.stderr
        assert f"fs.inotify.max_user_instances is {limit}" in done.stderr
        assert "sysctl -w fs.inotify.max_user_instances=" in done.stderr
        # As the hint says.
        odd.virtdctl("network", "start", "two")
        odd.sh("systemctl stop hungry.service")
        odd.virtdctl("network", "start", "one")
    finally:
        odd.sh("systemctl stop hungry.service", check=False)
        for name in ("one", "two"):
            odd.virtdctl("network", "stop", name, check=False)
            odd.virtdctl("network", "undefine", name, check=False)
        odd.sh("rm -f /etc/virtd/virtd.toml; systemctl restart virtd.service")
    nothing_left(odd)
