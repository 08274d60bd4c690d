# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains whose disks are volumes: started with their pools, protected while they run, whatever the daemon does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness import Attached, Lab, definition
from tests.live.test_storage import POOL, define, forget_pools, pool, refused, volume
from tests.live.tools import KILL

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["pool"]

pytestmark = pytest.mark.live


@pytest.fixture
def chain(lab: Lab, pool: str) -> Iterator[str]:
    """A bootable qcow2 volume `web1` that stands on `base`, both clones of what was imported."""
    volume(lab, "import", pool, "golden", "/usr/share/virtd-lab/disk.qcow2", "--from", "qcow2")
    volume(lab, "clone", pool, "golden", "base")
    volume(lab, "create", pool, "overlay", "--backing", "base")
    volume(lab, "clone", pool, "overlay", "web1")
    yield pool
    lab.undefine_all()
    assert lab.sh(f"stat -c '%U:%G %a' {POOL}/* | sort -u").strip() == "root:virtd-qemu 640", "all were given back"


# What the guest writes on its disk, behind its own file system: a sector at a time, each synced.
FIRST, COUNT = 90_000, 150
WRITES = (
    f"i=0; while [ $i -lt {COUNT} ]; do echo mark-$i-end | dd of=/dev/vda bs=512 seek=$(({FIRST}+i)) "
    "conv=notrunc,fsync 2>/dev/null || break; i=$((i+1)); [ $((i%10)) = 0 ] && echo at-$i; done"
)


def disk(name: str, more: str = "") -> str:
    return f'[[disk]]\npool = "default"\nvolume = "{name}"\n{more}'


def test_a_guest_that_writes_while_the_daemon_is_killed(lab: Lab, chain: str) -> None:
    """It boots from a cloned qcow2 volume with a backing volume, in a pool that wasn't started."""
    lab.virtdctl("pool", "stop", chain)
    before = lab.sh(f"sha256sum {POOL}/base {POOL}/golden")
    lab.virtdctl("define", "-", stdin=f'name = "web1"\nmemory = "128M"\n{disk("web1")}')
    lab.virtdctl("start", "web1")
    assert lab.json("pool", "info", chain)["state"] == "active"
    lab.wait_ready("web1", timeout=150)
    pid = lab.info("web1")["pid"]
    assert lab.sh(f"stat -c %U {POOL}/web1").strip() == "vm-web1"
    listed = {item["name"]: item["used_by"] for item in lab.json("volume", "list", chain)}
    assert (listed["web1"], listed["base"], listed["golden"]) == (["web1"], ["web1"], [])
    for arguments in (["delete", chain, "web1"], ["resize", chain, "web1", "1G"], ["clone", chain, "web1", "x"],
                      ["wipe", chain, "web1"], ["download", chain, "web1", "/tmp/x"]):  # fmt: skip
        assert "domain web1 writes to it" in refused(lab, *arguments), arguments
    volume(lab, "delete", chain, "overlay")
    for verb in ("delete", "wipe"):
        assert "backing store of default/web1" in refused(lab, verb, chain, "base")
    assert "domain web1 uses" in lab.virtdctl("pool", "stop", chain, check=False).stderr
    volume(lab, "clone", chain, "base", "another")  # to be read is no harm
    console = Attached(lab, "web1")
    console.type(f"sh {WRITES}\n")
    for number in range(3):
        assert console.heard(f"sh: at-{10 * (number + 1)}", 60)
        lab.sh(KILL)
        assert lab.info("web1")["pid"] == pid
        assert "domain web1 writes to it" in refused(lab, "delete", chain, "web1"), "also after a kill"
    assert console.heard("sh exit 0", 120)
    console.close()
    lab.virtdctl("stop", "web1")
    lab.sh(f"qemu-img convert -f qcow2 -O raw {POOL}/web1 /srv/written")
    written = lab.sh(
        f"dd if=/srv/written bs=512 skip={FIRST} count={COUNT} status=none | tr -d '\\0'; rm /srv/written"
    )
    assert written.split() == [f"mark-{number}-end" for number in range(COUNT)]
    assert lab.sh(f"sha256sum {POOL}/base {POOL}/golden") == before, "nobody writes to what others stand on"
    assert lab.sh(f"qemu-img check -q {POOL}/web1") == ""


def test_who_may_have_a_volume(lab: Lab, chain: str) -> None:
    lab.virtdctl("define", "-", stdin=definition("first", more=disk("web1")))
    lab.virtdctl("start", "first")
    lab.virtdctl("define", "-", stdin=definition("second", more=disk("web1")))
    told = lab.virtdctl("start", "second", check=False).stderr
    assert "in use by domain first" in told
    # What others stand on can be read, and isn't written to.
    lab.virtdctl("define", "-", stdin=definition("second", more=disk("base")))
    assert "backing store of" in lab.virtdctl("start", "second", check=False).stderr
    lab.virtdctl("define", "-", stdin=definition("second", more=disk("base", "readonly = true\n")))
    lab.virtdctl("start", "second")
    for text, word in (
        (disk("nothing"), "There is no volume nothing"),
        ('[[disk]]\npool = "nowhere"\nvolume = "x"\n', "There is no pool nowhere"),
        (disk("golden", 'format = "raw"\n'), 'expected "qcow2"'),
    ):
        lab.virtdctl("define", "-", stdin=definition("third", more=text))
        done = lab.virtdctl("start", "third", check=False)
        assert done.returncode == 1
        assert word in done.stderr
    lab.sh(f"cp {POOL}/golden {POOL}/foreign")
    lab.virtdctl("define", "-", stdin=definition("third", more=disk("foreign")))
    assert "isn't known" in lab.virtdctl("start", "third", check=False).stderr
    lab.sh(f"rm {POOL}/foreign")


# The lab's /dev has no loop devices of its own; the kernel's are shared with everybody on this machine.
LOOP = """set -e
test -e /dev/loop-control || mknod /dev/loop-control c 10 237
for number in 0 1 2 3 4 5 6 7; do test -e /dev/loop$number || mknod /dev/loop$number b 7 $number; done
mkdir -p /srv/loops; truncate -s {size}M /srv/loops/{kind}.img
mkfs.{kind} {quiet} /srv/loops/{kind}.img >/dev/null 2>&1
losetup --show -f /srv/loops/{kind}.img
"""


@pytest.mark.parametrize(("kind", "size", "quiet"), [("ext4", 64, "-q"), ("xfs", 320, "-q"), ("btrfs", 160, "-q")])
def test_filesystem_pools(lab: Lab, kind: str, size: int, quiet: str) -> None:
    if lab.run("sh", "-c", f"command -v mkfs.{kind}", check=False).returncode:
        pytest.skip(f"there is no mkfs.{kind} in this lab")
    device = lab.sh(LOOP.format(kind=kind, size=size, quiet=quiet)).strip()
    where = f"/srv/mounted/{kind}"
    try:
        define(lab, f'name = "fs"\ntype = "filesystem"\npath = "{where}"\nsource = "{device}"\n')
        lab.virtdctl("pool", "start", "fs")
        unit = lab.sh(f"systemd-escape --path --suffix=mount {where}").strip()
        assert lab.sh(f"systemctl show -P ActiveState {unit}").strip() == "active"
        assert "nosuid" in lab.sh(f"findmnt -no OPTIONS {where}")
        volume(lab, "create", "fs", "a", "16M")
        lab.sh(f"dd if=/dev/urandom of={where}/a bs=1M count=16 conv=notrunc,fsync status=none")
        earlier = {job["job"] for job in lab.json("volume", "jobs")}
        volume(lab, "clone", "fs", "a", "b")
        assert lab.sh(f"cmp {where}/a {where}/b") == ""
        jobs = {job["job"] for job in lab.json("volume", "jobs")} - earlier
        assert len(jobs) == (1 if kind == "ext4" else 0), "what can share blocks needs no job"
        for command in ("systemctl restart virtd", KILL):
            lab.sh(command)
            assert lab.json("pool", "info", "fs")["state"] == "active"
            assert {item["name"] for item in lab.json("volume", "list", "fs")} == {"a", "b"}
        lab.sh(f"sleep 600 <{where}/a >/dev/null 2>&1 & echo $! >/srv/loops/pid")
        assert "still uses it" in lab.virtdctl("pool", "stop", "fs", check=False).stderr
        assert lab.json("pool", "info", "fs")["state"] == "active"
        lab.sh("kill $(cat /srv/loops/pid)")
        lab.virtdctl("pool", "stop", "fs")
        assert lab.run("findmnt", where, check=False).returncode == 1
        lab.sh(f"touch {where}/file")
        assert "isn't empty" in lab.virtdctl("pool", "start", "fs", check=False).stderr
        lab.sh(f"rm {where}/file")
    finally:
        forget_pools(lab)
        lab.sh(f"losetup -d {device}; rm -rf /srv/loops; rmdir {where}", check=False)


def test_a_mount_that_fails(lab: Lab) -> None:
    define(lab, 'name = "fs"\ntype = "filesystem"\npath = "/srv/mounted/x"\nsource = "/dev/nothing"\n')
    try:
        assert "Cannot find /dev/nothing" in lab.virtdctl("pool", "start", "fs", check=False).stderr
        define(lab, 'name = "fs"\ntype = "filesystem"\npath = "/srv/mounted/x"\nsource = "/dev/null"\n')
        assert "no block device" in lab.virtdctl("pool", "start", "fs", check=False).stderr
        assert lab.json("pool", "info", "fs")["state"] == "inactive"
    finally:
        forget_pools(lab)
