# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools and volumes in a directory: made, cloned, imported, streamed, with the daemon killed at each step."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Failed, Lab
from tests.live.tools import KILL, spawn

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

POOL = "/srv/pool"
ATTACK = "/etc/shadow"


@pytest.fixture
def pool(lab: Lab) -> Iterator[str]:
    """An empty directory pool, and after the test: no volume, no job and nothing unfinished is left of it."""
    lab.sh(f"rm -rf {POOL}; mkdir -p -m 711 {POOL}")
    define(lab, f'name = "default"\npath = "{POOL}"\n')
    lab.virtdctl("pool", "start", "default")
    yield "default"
    lab.undefine_all()
    forget_pools(lab)
    lab.sh(f"rm -rf {POOL} /srv/images")


def define(lab: Lab, text: str) -> None:
    lab.virtdctl("pool", "define", "-", stdin=text)


def forget_pools(lab: Lab) -> None:
    """Delete every volume, stop and undefine every pool; what is under way is cancelled."""
    for job in lab.json("volume", "jobs"):
        if job["state"] in ("running", "waiting"):
            lab.virtdctl("volume", "cancel", job["job"])
    for item in lab.json("pool", "list"):
        if item["state"] == "active":
            lab.virtdctl("pool", "stop", item["name"])
        lab.virtdctl("pool", "undefine", item["name"])


def volume(lab: Lab, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return lab.virtdctl("volume", *arguments, check=check)


def refused(lab: Lab, *arguments: str) -> str:
    done = volume(lab, *arguments, check=False)
    assert done.returncode in (1, 4), (arguments, done.stdout, done.stderr)
    return done.stderr


def listed(lab: Lab, name: str = "default") -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in lab.json("volume", "list", name)}


def info(lab: Lab, name: str) -> dict[str, Any]:
    found: dict[str, Any] = lab.json("volume", "info", "default", name)
    return found


def unfinished(lab: Lab) -> str:
    return lab.sh(f"ls {POOL}/.virtd/new").strip()


def job_of(lab: Lab, verb: str, state: str = "running") -> dict[str, Any] | None:
    found = [job for job in lab.json("volume", "jobs") if (job["verb"], job["state"]) == (verb, state)]
    return found[-1] if found else None


def no_children(lab: Lab) -> bool:
    return lab.sh("systemctl list-units --all --plain --no-legend 'virtd-storage-*.service'") == ""


def test_a_pools_life(lab: Lab) -> None:
    lab.sh("rm -rf /srv/other")
    try:
        define(lab, 'name = "other"\npath = "/srv/other"\n')
        refused_start = lab.virtdctl("pool", "start", "other", check=False)
        assert refused_start.returncode == 1
        assert "no directory /srv/other" in refused_start.stderr
        assert "pool build other" in refused_start.stderr
        lab.virtdctl("pool", "build", "other")
        lab.virtdctl("pool", "start", "other")
        lab.virtdctl("pool", "start", "other")  # again does no harm
        (item,) = lab.json("pool", "list")
        assert (item["name"], item["state"], item["type"]) == ("other", "active", "directory")
        assert item["capacity"] >= item["available"] > 0
        assert lab.virtdctl("pool", "undefine", "other", check=False).returncode == 1
        # The flag lives through everything that a daemon does.
        for command in (
            "systemctl restart virtd",
            KILL,
            "systemctl stop virtd.service; systemctl start virtd.service",
        ):
            lab.sh(command)
            assert lab.json("pool", "info", "other")["state"] == "active", command
        lab.virtdctl("pool", "autostart", "other")
        assert lab.json("pool", "info", "other")["autostart"] is True
        assert lab.json("pool", "info", "other")["pending"] is False
        lab.virtdctl("pool", "stop", "other")
        lab.sh("systemctl restart virtd")
        assert lab.json("pool", "info", "other")["state"] == "inactive", "autostart is once for each boot"
        # As after a boot.
        lab.sh(
            "systemctl stop virtd.socket virtd.service; rm -rf /run/virtd/storage /run/virtd/autostarted "
            "/var/lib/virtd/autostarted; "
            "systemctl start virtd.socket virtd.service"
        )
        lab.wait("the autostart", lambda: lab.json("pool", "info", "other")["state"] == "active", 20)
    finally:
        forget_pools(lab)
        lab.sh("rm -rf /srv/other")
    assert lab.json("pool", "list") == []


def test_create_list_delete(lab: Lab, pool: str) -> None:
    volume(lab, "create", pool, "plain", "64M")
    volume(lab, "create", pool, "full", "8MiB", "--preallocation", "full")
    volume(lab, "create", pool, "there", "8M", "--preallocation", "falloc")
    volume(lab, "create", pool, "thin", "1G", "--format", "qcow2")
    volume(lab, "create", pool, "meta", "16M", "--format", "qcow2", "--preallocation", "metadata")
    volume(lab, "create", pool, "top", "--backing", "thin")
    found = listed(lab)
    assert {name: (item["format"], item["capacity"]) for name, item in found.items()} == {
        "plain": ("raw", 64 << 20), "full": ("raw", 8 << 20), "there": ("raw", 8 << 20),
        "thin": ("qcow2", 1 << 30), "meta": ("qcow2", 16 << 20), "top": ("qcow2", 1 << 30),
    }  # fmt: skip
    assert found["plain"]["allocation"] < 1 << 20
    assert found["full"]["allocation"] >= 8 << 20
    assert found["there"]["allocation"] >= 8 << 20
    # What qemu-img itself sees.
    seen = json.loads(lab.sh(f"qemu-img info --output=json {POOL}/top"))
    assert (seen["virtual-size"], seen["full-backing-filename"]) == (1 << 30, f"{POOL}/thin")
    assert seen["backing-filename-format"] == "qcow2"
    assert [link["volume"] for link in info(lab, "top")["chain"]] == ["thin"]
    assert info(lab, "thin")["backing_of"] == ["default/top"]
    assert lab.sh(f"stat -c '%U:%G %a' {POOL}/* | sort -u").strip() == "root:virtd-qemu 640"
    assert "backing store of default/top" in refused(lab, "delete", pool, "thin")
    assert "already" in refused(lab, "create", pool, "plain", "1M")
    volume(lab, "delete", pool, "top", *(name for name in found if name != "top"))
    assert listed(lab) == {}
    lab.sh(f"touch {POOL}/.virtd/new/job-00000000")
    assert lab.virtdctl("pool", "refresh", pool).stdout == "Removed job-00000000, which was unfinished.\n"
    assert lab.sh(f"ls -A {POOL}; ls -A {POOL}/.virtd").split() == [".virtd", "new"]
    assert unfinished(lab) == ""
    assert no_children(lab)
    assert lab.slots() == 0
    assert lab.sh("ls /var/log/virtd/storage") == ""


def test_clone_resize_wipe(lab: Lab, pool: str) -> None:
    lab.sh("mkdir -p /srv/images && cd /srv/images && qemu-img create -q -f qcow2 a.qcow2 64M && "
           "qemu-io -c 'write -P 7 1M 2M' a.qcow2 >/dev/null && qemu-img snapshot -c before a.qcow2")  # fmt: skip
    volume(lab, "import", pool, "a", "/srv/images/a.qcow2", "--from", "qcow2")
    volume(lab, "clone", pool, "a", "b")
    assert lab.sh(f"cmp {POOL}/a {POOL}/b && qemu-img check -q {POOL}/b") == ""
    (snapshot,) = lab.json("volume", "snapshots", pool, "b")
    assert (snapshot["id"], snapshot["name"]) == ("1", "before")
    volume(lab, "resize", pool, "b", "96M")
    assert info(lab, "b")["capacity"] == 96 << 20
    assert "--shrink" in refused(lab, "resize", pool, "b", "32M")
    # A sparse raw one.
    volume(lab, "create", pool, "raw", "256M")
    lab.sh(f"printf hello | dd of={POOL}/raw bs=1 seek=100M conv=notrunc status=none")
    volume(lab, "clone", pool, "raw", "copy")
    assert lab.sh(f"cmp {POOL}/raw {POOL}/copy") == ""
    assert info(lab, "copy")["allocation"] < 1 << 20, "holes stay holes"
    volume(lab, "resize", pool, "copy", "512M")
    assert "--shrink" in refused(lab, "resize", pool, "copy", "1M")
    volume(lab, "resize", pool, "copy", "64M", "--shrink")
    assert lab.sh(f"stat -c %s {POOL}/copy").strip() == str(64 << 20)
    for name in ("raw", "a"):
        volume(lab, "wipe", pool, name)
        assert info(lab, name)["trouble"] == ""
    assert lab.sh(f"tr -d '\\0' <{POOL}/raw | wc -c").strip() == "0"
    assert (
        lab.sh(f"qemu-io -r -f qcow2 -c 'read -P 0 0 64M' {POOL}/a | grep -c 'verification failed'", check=False)
        == "0\n"
    )
    assert lab.sh(f"stat -c '%U:%G %a' {POOL}/* | sort -u").strip() == "root:virtd-qemu 640"


def test_streams(lab: Lab, pool: str) -> None:
    lab.sh("mkdir -p /srv/images && cd /srv/images && truncate -s 300M sparse && "
           "dd if=/dev/urandom of=sparse bs=1M count=3 seek=200 conv=notrunc status=none")  # fmt: skip
    volume(lab, "upload", pool, "up", "/srv/images/sparse")
    assert lab.sh(f"cmp /srv/images/sparse {POOL}/up") == ""
    assert info(lab, "up")["allocation"] < 8 << 20
    volume(lab, "download", pool, "up", "/srv/images/down")
    assert lab.sh("cmp /srv/images/sparse /srv/images/down; du -m /srv/images/down | cut -f1").strip() in ("3", "4")
    assert "--force" in refused(lab, "download", pool, "up", "/srv/images/down")
    # Through pipes.
    lab.sh("virtdctl volume download default up - | cmp - /srv/images/sparse")
    lab.sh("cat /srv/images/sparse | virtdctl volume upload default piped -")
    assert lab.sh(f"cmp /srv/images/sparse {POOL}/piped") == ""
    # Cut off in the middle, by a client that is killed; the daemon is, too.
    lab.sh("(head -c 50M /dev/urandom; head -c 30M /dev/zero) >/srv/images/large")
    client = spawn(
        lab, "sh", "-c", "(head -c 20M /srv/images/large; sleep 61) | virtdctl volume upload default large -"
    )
    try:
        lab.wait(
            "20 MB",
            lambda: lab.sh(f"stat -c %s {POOL}/.virtd/new/* 2>/dev/null", check=False).strip() == str(20 << 20),
            60,
        )
        lab.sh(KILL)
        assert "large" not in listed(lab), "half of it isn't there"
        assert (job_of(lab, "upload", "waiting") or {})["volume"] == "large"
        assert "upload" in lab.virtdctl("status", check=False).stdout
    finally:
        lab.sh("pkill -9 -f '[v]irtdctl volume upload'; pkill -9 -f 'sleep 6[1]'", check=False)
        client.kill()
        client.communicate()
    assert "is under way" in refused(lab, "create", pool, "large", "1M")
    volume(lab, "upload", pool, "large", "/srv/images/large", "--resume")
    assert lab.sh(f"cmp /srv/images/large {POOL}/large") == ""
    lab.sh("head -c 30M /srv/images/large >/srv/images/part")
    volume(lab, "download", pool, "large", "/srv/images/part", "--resume")
    assert lab.sh("cmp /srv/images/large /srv/images/part") == ""
    # A raw disk that looks like something else is what it was said to be.
    assert "no usable qcow2" in refused(lab, "upload", pool, "lie", "/srv/images/large", "--format", "qcow2")
    assert "lie" not in listed(lab)
    assert unfinished(lab) == ""


def test_foreign_images(lab: Lab, pool: str) -> None:
    """Formats are what a person says; an image that says something dangerous of itself is refused."""
    lab.sh("mkdir -p /srv/images && cd /srv/images && "
           f"qemu-img create -q -f qcow2 -b {ATTACK} -F raw evil.qcow2 && "
           "truncate -s 8M raw && qemu-img convert -f raw -O vmdk raw disk.vmdk && "
           f"cp evil.qcow2 {POOL}/evil && ln -s {ATTACK} {POOL}/link && "
           f"mkdir {POOL}/dir && touch {POOL}/.hidden")  # fmt: skip
    found = listed(lab)
    assert set(found) == {"evil"}
    assert found["evil"]["format"] is None
    assert "expected the format" in refused(lab, "import", pool, "x", "/srv/images/evil.qcow2")
    for how in (["--from", "qcow2"], ["--probe"]):
        told = refused(lab, "import", pool, "x", "/srv/images/evil.qcow2", *how)
        assert f"backing file outside any pool: {ATTACK}" in told
        assert "outside any pool" in refused(lab, "import", pool, "evil", *how)
    assert "isn't known" in refused(lab, "clone", pool, "evil", "copy")
    # As raw it is only bytes, and stays that.
    volume(lab, "import", pool, "evil", "--from", "raw")
    volume(lab, "clone", pool, "evil", "copy")
    assert listed(lab)["copy"]["format"] == "raw"
    assert info(lab, "copy")["chain"] == []
    volume(lab, "import", pool, "disk", "/srv/images/disk.vmdk", "--from", "vmdk", "--format", "raw")
    assert listed(lab)["disk"]["capacity"] == 8 << 20
    for name in ("link", "dir", "../etc/passwd", ".virtd", "a/b", ""):
        assert refused(lab, "info", pool, name)
        assert refused(lab, "delete", pool, name)
    assert lab.sh(f"test -s {ATTACK} && readlink {POOL}/link").strip() == ATTACK
    # Corrupt ones.
    lab.sh("cd /srv/images && qemu-img create -q -f qcow2 bad.qcow2 64M && "
           "qemu-io -c 'write 0 8M' bad.qcow2 >/dev/null && "
           "dd if=/dev/urandom of=bad.qcow2 bs=64K seek=1 count=2 conv=notrunc status=none && "
           "head -c 100 bad.qcow2 >cut.qcow2")  # fmt: skip
    assert "Check failed" in refused(lab, "import", pool, "bad", "/srv/images/bad.qcow2", "--from", "qcow2")
    assert "cut off" in refused(lab, "import", pool, "cut", "/srv/images/cut.qcow2", "--from", "qcow2")
    assert "Check failed" in refused(lab, "upload", pool, "bad", "/srv/images/bad.qcow2", "--format", "qcow2")
    assert set(listed(lab)) == {"evil", "copy", "disk"}
    assert unfinished(lab) == ""
    # The user's own file is as it was.
    assert lab.sh("stat -c '%U %a' /srv/images/disk.vmdk").strip() == "root 644"


def test_bad_input(lab: Lab, pool: str) -> None:
    for size, word in (
        ("0", "more than 0"),
        ("-1", "expected"),
        ("10X", "such as"),
        ("8000P", "at most"),
        ("900T", "at most what"),
    ):
        assert word in volume(lab, "create", pool, "x", "--", size, check=False).stderr, size
    for name in ("../x", "a/b", ".hidden", "-x", "a b", "ü", "x" * 200):
        done = lab.run("virtdctl", "volume", "create", pool, "--", name, "1M", check=False)
        assert done.returncode == 1, name
        assert "file name" in done.stderr
    assert listed(lab) == {}
    assert "There is no pool nowhere" in refused(lab, "list", "nowhere")
    for text, word in (
        ('name = "p"\n', "path"),
        ('name = "p"\npath = "relative"\n', "absolute"),
        ('name = "p"\npath = "/srv/../etc"\n', "without"),
        ('name = "job-1"\npath = "/srv/p"\n', "job-"),
        ('name = "p"\npath = "/srv/p"\ntype = "rbd"\n', "expected one of"),
        (f'name = "p"\npath = "{POOL}"\n', "pool default already"),
    ):
        done = lab.virtdctl("pool", "define", "-", stdin=text, check=False)
        assert done.returncode == 1
        assert word in done.stderr, (text, done.stderr)
    lab.sh("mkdir -p /srv/p && chown 12345 /srv/p")
    define(lab, 'name = "p"\npath = "/srv/p"\n')
    assert "belongs to user 12345" in lab.virtdctl("pool", "start", "p", check=False).stderr
    lab.sh("chown root /srv/p && chmod 777 /srv/p")
    assert "written by everybody" in lab.virtdctl("pool", "start", "p", check=False).stderr
    lab.sh("chmod 755 /srv/p && mount -t tmpfs -o ro,mode=755 tmpfs /srv/p")
    try:
        assert "Read-only" in lab.virtdctl("pool", "start", "p", check=False).stderr
    finally:
        lab.sh("umount /srv/p")
    # One that goes away while it is active harms no other.
    lab.virtdctl("pool", "start", "p")
    lab.sh("mv /srv/p /srv/gone && systemctl restart virtd")
    told = lab.wait("the problem", lambda: lab.virtdctl("status", check=False).stdout, 20)
    lab.wait("it", lambda: "Pool p was active" in lab.virtdctl("status", check=False).stdout, 20)
    assert told
    assert "no directory" in refused(lab, "list", "p")
    volume(lab, "create", pool, "x", "1M")
    lab.sh("rmdir /srv/gone/.virtd/new /srv/gone/.virtd; rmdir /srv/gone")


def test_a_full_disk(lab: Lab) -> None:
    lab.sh("mkdir -p /srv/small /srv/images && mount -t tmpfs -o size=20M,mode=755 tmpfs /srv/small")
    try:
        define(lab, 'name = "small"\npath = "/srv/small"\n')
        lab.virtdctl("pool", "start", "small")
        volume(lab, "create", "small", "first", "12M", "--preallocation", "full")
        for arguments in (["clone", "small", "first", "second"], ["upload", "small", "second", "/srv/small/first"]):
            assert "No space left" in refused(lab, *arguments), arguments
            assert set(listed(lab, "small")) == {"first"}
            assert lab.sh("ls /srv/small/.virtd/new").strip() == "" or arguments[0] == "upload"
        for job in lab.json("volume", "jobs"):
            if job["state"] == "waiting":
                lab.virtdctl("volume", "cancel", job["job"])
        assert lab.sh("ls /srv/small/.virtd/new").strip() == ""
        assert "available" in refused(lab, "create", "small", "x", "12M", "--preallocation", "full")
    finally:
        forget_pools(lab)
        lab.sh("umount /srv/small")


def busy_source(lab: Lab, pool: str, size: str = "200M") -> None:
    """A volume with data in it, none of which is a hole."""
    volume(lab, "create", pool, "source", size)
    lab.sh(
        f"dd if=/dev/zero of={POOL}/source bs=1M count={size[:-1]} conv=notrunc status=none; "
        f"dd if=/dev/urandom of={POOL}/source bs=1M count=5 seek=50 conv=notrunc status=none"
    )


STOPPER = Path(__file__).with_name("stopper.py").read_text()


def slowly(lab: Lab, command: list[str]) -> subprocess.Popen[str]:
    """Run a command whose job is stopped (SIGSTOP) as soon as it is there, so that things can happen meanwhile."""
    stopper = spawn(lab, "python3", "-c", STOPPER)
    time.sleep(0.3)  # until it looks; a job that is faster isn't stopped, and the test fails
    client = spawn(lab, *command)
    stopper.communicate(timeout=60)
    assert stopper.returncode == 0
    lab.wait("the job's PID", lambda: any(job["pid"] for job in lab.json("volume", "jobs")), 20)
    return client


def go_on(lab: Lab) -> None:
    lab.sh(
        "for unit in $(systemctl list-units --plain --no-legend 'virtd-storage-job*' | cut -d' ' -f1); do "
        "systemctl kill -s CONT $unit; done"
    )


def test_a_job_outlives_the_daemon(lab: Lab, pool: str) -> None:
    busy_source(lab, pool)
    client = slowly(lab, ["virtdctl", "volume", "clone", pool, "source", "copy"])
    job = lab.wait("the job", lambda: job_of(lab, "clone"), 10)
    # Images come from anywhere: what reads them has little to lose.
    status = dict(
        line.split(":", 1) for line in lab.sh(f"cat /proc/{job['pid']}/status").replace("\t", " ").splitlines()
    )
    user = lab.sh("id -u virtd-qemu").strip()
    assert status["Uid"].split() == [user] * 4
    assert {int(status[key], 16) for key in ("CapEff", "CapPrm", "CapBnd")} == {1 << 2}, "CAP_DAC_READ_SEARCH alone"
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")
    root = f"/proc/{job['pid']}/root"
    assert lab.sh(f"ls {root}/srv {root}{POOL}").split() == [f"{root}/srv:", "pool", f"{root}{POOL}:", "source"]
    assert lab.sh(f"ls -A {root}/root {root}/home 2>/dev/null | grep -v :$", check=False).strip() == ""
    assert "Max core file size        0" in lab.sh(f"cat /proc/{job['pid']}/limits")
    lab.sh("systemctl restart virtd")
    again = lab.wait("the job after a restart", lambda: (j := job_of(lab, "clone")) and j["pid"] and j, 10)
    assert again["job"] == job["job"]
    lab.sh(KILL)
    assert lab.wait("the job after a kill", lambda: job_of(lab, "clone"), 10)["pid"] == again["pid"]
    assert "copy" not in listed(lab)
    assert job["job"] in lab.virtdctl("status", check=False).stdout
    assert "is under way" in refused(lab, "resize", pool, "source", "1G")
    assert "is under way" in refused(lab, "delete", pool, "source")
    assert "is under way" in lab.virtdctl("pool", "stop", pool, check=False).stderr
    lab.sh(KILL)
    go_on(lab)
    out, err = client.communicate(timeout=120)
    assert client.returncode == 0, (out, err)
    assert lab.sh(f"cmp {POOL}/source {POOL}/copy") == ""
    assert no_children(lab)


def test_a_jobs_result_waits_for_the_daemon(lab: Lab, pool: str) -> None:
    busy_source(lab, pool)
    client = slowly(lab, ["virtdctl", "volume", "clone", pool, "source", "copy"])
    lab.sh("systemctl stop virtd.socket virtd.service")
    go_on(lab)
    lab.wait(
        "the end of the job", lambda: lab.sh("systemctl show -P SubState virtd-storage-job*").strip() == "exited", 60
    )
    assert lab.sh(f"test -e {POOL}/copy || echo no").strip() == "no", "nobody has finished it"
    lab.sh("systemctl start virtd.socket virtd.service")
    lab.wait("the volume", lambda: "copy" in listed(lab), 20)
    assert lab.sh(f"cmp {POOL}/source {POOL}/copy") == ""
    client.communicate(timeout=60)
    # And one that was killed meanwhile leaves nothing.
    client = slowly(lab, ["virtdctl", "volume", "clone", pool, "source", "third"])
    lab.sh(
        "systemctl stop virtd.socket virtd.service; systemctl kill -s KILL 'virtd-storage-job*'; "
        "systemctl start virtd.socket virtd.service"
    )
    _, err = client.communicate(timeout=60)
    assert client.returncode == 1
    assert "killed by SIGKILL" in err
    assert unfinished(lab) == ""
    assert set(listed(lab)) == {"source", "copy"}


def test_cancel(lab: Lab, pool: str) -> None:
    busy_source(lab, pool)
    client = slowly(lab, ["virtdctl", "volume", "clone", pool, "source", "copy"])
    job = lab.wait("the job", lambda: job_of(lab, "clone"), 10)
    lab.virtdctl("volume", "cancel", job["job"])
    _, err = client.communicate(timeout=60)
    assert client.returncode == 1
    assert "cancelled by root" in err
    assert set(listed(lab)) == {"source"}
    assert unfinished(lab) == ""
    assert no_children(lab)
    # A wipe that is cut off leaves a volume that nobody may use, and says so.
    client = slowly(lab, ["virtdctl", "volume", "wipe", pool, "source"])
    assert "being wiped" in info(lab, "source")["trouble"]
    lab.virtdctl("volume", "cancel", (job_of(lab, "wipe") or {})["job"])
    client.communicate(timeout=60)
    assert "being wiped" in info(lab, "source")["trouble"]
    assert "can't be used" in refused(lab, "clone", pool, "source", "copy")
    volume(lab, "wipe", pool, "source")
    assert info(lab, "source")["trouble"] == ""


def test_killed_at_random(lab: Lab, pool: str) -> None:
    """What is listed is whole, whenever the daemon is killed; what virtdctl reports is so."""
    lab.sh(f"mkdir -p /srv/images; head -c 30M /dev/urandom >/srv/images/data; cp /srv/images/data {POOL}/source")
    volume(lab, "import", pool, "source", "--from", "raw")
    for number in range(5):
        client = spawn(lab, "sh", "-c", f"virtdctl volume clone default source c{number} && "
                       f"virtdctl volume create default q{number} 1G --format qcow2 && "
                       f"virtdctl volume upload default u{number} /srv/images/data && "
                       f"virtdctl volume delete default u{number}")  # fmt: skip
        for turn in range(3):
            time.sleep(0.02 + 0.07 * number + 0.15 * turn)
            lab.sh(KILL, check=False)
            for name in listed(lab):
                if name[0] in "cu":
                    assert lab.sh(f"test ! -e {POOL}/{name} || cmp /srv/images/data {POOL}/{name}") == ""
        out, err = client.communicate(timeout=120)
        assert client.returncode == 0, (number, out, err)
        assert {f"c{number}", f"q{number}"} <= set(listed(lab))
        assert f"u{number}" not in listed(lab)
    lab.wait("nothing unfinished", lambda: unfinished(lab) == "", 20)
    assert lab.sh(f"for q in {POOL}/q*; do qemu-img check -q $q || echo $q; done") == ""
    lab.wait("no unit", lambda: no_children(lab), 20)
    assert lab.slots() == 0


def test_progress_on_a_terminal_and_elsewhere(lab: Lab, pool: str) -> None:
    busy_source(lab, pool)
    for command, expected in (
        (["virtdctl", "volume", "clone", pool, "source", "lines"], "Cloning source: "),
        (["script", "-qec", f"virtdctl volume clone {pool} source bar", "/dev/null"], "Cloning source ["),
    ):
        client = slowly(lab, command)
        time.sleep(3)  # it shows nothing of what is over at once
        go_on(lab)
        out, err = client.communicate(timeout=60)
        assert client.returncode == 0
        assert expected in out + err
        assert " %" in out + err


def test_who_may(lab: Lab, pool: str) -> None:
    volume(lab, "create", pool, "x", "1M")
    as_nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "virtdctl"]
    assert "x" in lab.run(*as_nobody, "volume", "list", pool).stdout
    for arguments in (["create", pool, "y", "1M"], ["delete", pool, "x"], ["download", pool, "x", "/tmp/x"]):
        done = lab.run(*as_nobody, "volume", *arguments, check=False)
        assert done.returncode != 0
        assert "may not call" in done.stderr
    with pytest.raises(Failed):
        lab.run(*as_nobody, "pool", "stop", pool)


# Uploads a file over D-Bus in two goes, and downloads it again.
STREAMER = """
import os, shutil, sys
from gi.repository import Gio, GLib
pool, source, target = sys.argv[1:]
bus = Gio.bus_get_sync(Gio.BusType.SYSTEM)
def call(path, member, signature, *args):
    return bus.call_with_unix_fd_list_sync(
        "org.virtd1", "/org/virtd1/pool" + path, "org.virtd1.Pool" + ("" if path else "Manager"), member,
        GLib.Variant(signature, args), None, Gio.DBusCallFlags.NONE, 60000, None)
with open(source, "rb") as file:
    for resume, piece in ((False, 5 << 20), (True, -1)):
        answer, handles = call("/" + pool, "UploadVolume", "(sstb)", "streamed", "raw", 0, resume)
        job, content, offset = answer.unpack()
        assert offset == file.tell(), offset
        with open(handles.get(content), "wb") as volume:
            volume.seek(offset)
            volume.write(file.read(piece))
call("", "Uploaded", "(s)", job)
answer, handles = call("/" + pool, "DownloadVolume", "(s)", "streamed")
with open(handles.get(answer.unpack()[1]), "rb") as volume, open(target, "wb") as file:
    shutil.copyfileobj(volume, file)
"""


def test_the_bus_has_pools(lab: Lab, pool: str) -> None:
    def call(path: str, member: str, *arguments: str) -> str:
        interface, _, method = member.partition(".")
        return lab.run("busctl", "call", "org.virtd1", path, f"org.virtd1.{interface}", method, *arguments).stdout

    here = f"/org/virtd1/pool/{pool}"
    assert '"active"' in lab.sh(f"busctl get-property org.virtd1 {here} org.virtd1.Pool State")
    reply = call(here, "Pool.CreateVolume", "sss", "web1", "16M", "qcow2")
    job = reply.split('"')[1]
    assert '"done"' in lab.wait(
        "the job",
        lambda: (r := call("/org/virtd1/pool", "PoolManager.WaitJob", "sd", job, "5")) and "done" in r and r,
    )
    assert "web1" in call(here, "Pool.ListVolumes")
    assert call(here, "Pool.DeleteVolume", "s", "web1") == 's ""\n'
    assert listed(lab) == {}
    # Content goes through descriptors, which busctl can't take.
    lab.sh("mkdir -p /srv/images && head -c 20M /dev/urandom >/srv/images/20")
    lab.run("python3", "-c", STREAMER, pool, "/srv/images/20", "/srv/images/back")
    assert lab.sh(f"cmp /srv/images/20 {POOL}/streamed && cmp /srv/images/20 /srv/images/back") == ""
    assert (info(lab, "streamed")["format"], unfinished(lab)) == ("raw", "")
