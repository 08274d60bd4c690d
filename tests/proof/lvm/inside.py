# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is tried in the machine, with real volume groups and a real NFS server. Run by a unit, on each of its boots.

Each line on the console begins with a word: `ok`, `FAILED`, or at the end of a boot `crashing` or `verdict`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

STATE = "/var/lib/storage-test"
FIRST_BOOT = Path(STATE, "first")  # what came of it
IMAGE = f"{STATE}/image"
STOPPER = Path(__file__).with_name("stopper.py")
SIZE = 16 << 20
KILL = "kill -9 $(systemctl show -P MainPID virtd.service)"
LATE = "still finding out"  # what a daemon says that takes more than 30 s to
CRASH = "crash"  # as a step to choose


def sh(script: str, *, check: bool = True) -> str:
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{script}: status {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def virtdctl(*words: str, stdin: str = "") -> str:
    done = subprocess.run(["virtdctl", *words], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"virtdctl {' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


def refused(expected: str, *words: str, stdin: str = "") -> None:
    done = subprocess.run(["virtdctl", *words], input=stdin, capture_output=True, text=True, check=False)
    said = " ".join(done.stderr.split())
    assert done.returncode != 0, f"virtdctl {' '.join(words)} succeeded"
    assert expected in said, f"virtdctl {' '.join(words)}: {said!r}, expected {expected!r}"


def asked(*words: str) -> Any:
    return json.loads(virtdctl(*words, "--json"))


def until(what: str, condition: Callable[[], Any], limit: float = 120) -> Any:
    end = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.1)
    return value


def after(command: str) -> None:
    """Do what ends the daemon, and wait until the next one knows what runs, which this machine takes its time for."""
    sh(command)
    ask = ["virtdctl", "volume", "list", "vg"]
    until("an answer", lambda: subprocess.run(ask, capture_output=True, check=False).returncode == 0, 600)


def volumes(pool: str = "vg") -> dict[str, Any]:
    return {volume["name"]: volume for volume in asked("volume", "list", pool)}


def tags(name: str) -> str:
    return sh(f"lvs --noheadings -o lv_tags vg0/{name}")


def owner(name: str) -> str:
    return sh(f"stat -L -c %U:%G /dev/vg0/{name}")


def lvs() -> set[str]:
    return set(sh("lvs --noheadings -o lv_name vg0").split())


def same(name: str, size: int = SIZE) -> bool:
    return sh(f"cmp -n {size} {IMAGE} /dev/vg0/{name}") == ""


def a_pool_needs_its_group() -> None:
    virtdctl("pool", "define", "-", stdin='name = "none"\ntype = "logical"\npath = "/dev/none"\n')
    refused('Volume group "none" not found', "pool", "start", "none")
    assert asked("pool", "info", "none")["state"] == "inactive"
    virtdctl("pool", "undefine", "none")


def a_pool_is_started() -> None:
    sh("vgcreate vg0 /dev/vdb && vgchange -an vg0")
    virtdctl("pool", "define", "-", stdin='name = "vg"\ntype = "logical"\npath = "/dev/vg0"\nautostart = true\n')
    virtdctl("pool", "start", "vg")
    pool = asked("pool", "info", "vg")
    assert pool["state"] == "active", pool
    assert pool["capacity"] == int(sh("vgs --noheadings --nosuffix --units b -o vg_size vg0")), pool
    assert pool["available"] == pool["capacity"], pool
    assert volumes() == {}


def volumes_are_made() -> None:
    virtdctl("volume", "create", "vg", "a", "16M")
    found = volumes()["a"]
    assert (found["format"], found["capacity"], found["trouble"]) == ("raw", SIZE, ""), found
    assert (owner("a"), "virtd_new" in tags("a")) == ("root:disk", False), (owner("a"), tags("a"))
    assert sh("tr -d '\\0' </dev/vg0/a | wc -c") == "0"
    # Rounded up to whole extents, which are 4M.
    virtdctl("volume", "create", "vg", "odd", "5M")
    assert volumes()["odd"]["capacity"] == 8 << 20, volumes()["odd"]
    virtdctl("volume", "create", "vg", "full", "8M", "--preallocation", "full")
    assert asked("pool", "info", "vg")["allocation"] == 32 << 20
    virtdctl("volume", "delete", "vg", "odd", "full")
    assert lvs() == {"a"}


def what_cant_be_is_refused() -> None:
    refused("already", "volume", "create", "vg", "a", "16M")
    refused('expected "raw"', "volume", "create", "vg", "b", "16M", "--format", "qcow2")
    refused("at most", "volume", "create", "vg", "b", "1T")
    refused("more than 0", "volume", "create", "vg", "b", "0")
    refused("name", "volume", "create", "vg", "../b", "1M")
    refused("There is no volume", "volume", "info", "vg", "nothing")
    virtdctl("volume", "create", "vg", "most", "400M")
    refused("lvcreate", "volume", "create", "vg", "b", "300M")
    virtdctl("volume", "delete", "vg", "most")
    assert lvs() == {"a"}, lvs()
    assert asked("volume", "jobs") == [] or all(job["verb"] != "tool" for job in asked("volume", "jobs"))


def content_comes_and_goes() -> None:
    sh(f"head -c {SIZE} /dev/urandom >{IMAGE}")
    virtdctl("volume", "upload", "vg", "up", IMAGE)
    assert same("up")
    assert (owner("up"), "virtd_new" in tags("up")) == ("root:disk", False)
    refused("expected a size", "volume", "upload", "vg", "piped", "-", stdin="x")
    sh(f"cat {IMAGE} | virtdctl volume upload --size {SIZE} vg piped -")
    assert same("piped")
    virtdctl("volume", "download", "vg", "up", f"{STATE}/down")
    assert sh(f"cmp {IMAGE} {STATE}/down && rm {STATE}/down") == ""
    virtdctl("volume", "import", "vg", "raw", IMAGE, "--from", "raw")
    assert same("raw")
    sh(f"qemu-img convert -f raw -O qcow2 {IMAGE} {IMAGE}.qcow2")
    virtdctl("volume", "import", "vg", "converted", f"{IMAGE}.qcow2", "--from", "qcow2", "--format", "raw")
    assert same("converted")
    virtdctl("volume", "delete", "vg", "piped", "raw", "converted")
    assert lvs() == {"a", "up"}, lvs()


def volumes_are_cloned_and_change() -> None:
    virtdctl("volume", "clone", "vg", "up", "copy")
    assert same("copy")
    virtdctl("volume", "resize", "vg", "copy", "24M")
    assert volumes()["copy"]["capacity"] == 24 << 20
    assert same("copy")
    refused("--shrink", "volume", "resize", "vg", "copy", "8M")
    virtdctl("volume", "resize", "vg", "copy", "8M", "--shrink")
    assert volumes()["copy"]["capacity"] == 8 << 20
    assert same("copy", 8 << 20)
    virtdctl("volume", "wipe", "vg", "copy")
    assert sh("tr -d '\\0' </dev/vg0/copy | wc -c") == "0"
    assert (volumes()["copy"]["trouble"], tags("copy").count("damaged")) == ("", 0), (volumes()["copy"], tags("copy"))
    virtdctl("volume", "delete", "vg", "copy")


def a_qcow2_volume_stands_on_a_logical_one() -> None:
    sh("mkdir -m 711 /srv/dir")
    virtdctl("pool", "define", "-", stdin='name = "dir"\npath = "/srv/dir"\n')
    virtdctl("pool", "start", "dir")
    virtdctl("volume", "create", "dir", "top", "--backing", "up", "--backing-pool", "vg")
    (link,) = asked("volume", "info", "dir", "top")["chain"]
    assert (link["pool"], link["volume"], link["format"]) == ("vg", "up", "raw"), link
    refused("backing store of dir/top", "volume", "delete", "vg", "up")
    assert sh(f"qemu-img compare -f raw -F qcow2 {IMAGE} /srv/dir/top") == "Images are identical."
    virtdctl("volume", "delete", "dir", "top")


def a_guest_has_a_logical_volume() -> None:
    disk = '[[disk]]\npool = "vg"\nvolume = "up"\n'
    for name in ("one", "two"):
        virtdctl("define", "-", stdin=f'name = "{name}"\nmemory = "32M"\nmachine = "pc"\n{disk}')
    virtdctl("pool", "stop", "vg")
    virtdctl("start", "one")
    assert asked("pool", "info", "vg")["state"] == "active", "it wasn't started for the guest"
    assert owner("up").startswith("vm-one:"), owner("up")
    pid = asked("info", "one")["pid"]
    assert sh(f"stat -c %U /proc/{pid}") == "vm-one"
    refused("in use by domain one", "start", "two")
    refused("domain one", "volume", "delete", "vg", "up")
    refused("domain one", "volume", "resize", "vg", "up", "64M")
    refused("domain one", "pool", "stop", "vg")
    after(KILL)
    refused("domain one", "volume", "delete", "vg", "up")
    assert asked("info", "one")["pid"] == pid
    virtdctl("stop", "one")
    assert owner("up") == "root:disk", owner("up")
    virtdctl("undefine", "one", "two")
    assert same("up")


def stopped_clone(target: str) -> subprocess.Popen[str]:
    """A clone whose copying program stands still."""
    stopper = subprocess.Popen([sys.executable, STOPPER])
    client = subprocess.Popen(["virtdctl", "volume", "clone", "vg", "up", target], stderr=subprocess.PIPE, text=True)
    try:
        until("the copying", lambda: stopper.poll() is not None or client.poll() is not None)
        assert client.poll() is None, client.communicate()[1]
    finally:
        stopper.kill()
        stopper.wait()
    return client


def a_clone_outlives_the_daemon() -> None:
    client = stopped_clone("copy")
    after(KILL)
    assert set(volumes()) == {"a", "up"}, "half of it is listed"
    assert "copy" in lvs()
    assert "virtd_new" in tags("copy"), tags("copy")
    refused("copy", "volume", "create", "vg", "copy", "8M")
    sh("systemctl restart virtd")
    sh("systemctl kill -s CONT 'virtd-storage-job*'")
    _, err = client.communicate(timeout=300)
    assert client.returncode == 0, err
    assert same("copy")
    assert "virtd_new" not in tags("copy"), tags("copy")
    virtdctl("volume", "delete", "vg", "copy")


def a_clone_is_cancelled() -> None:
    client = stopped_clone("copy")
    (job,) = [job for job in asked("volume", "jobs") if job["state"] == "running"]
    virtdctl("volume", "cancel", job["job"])
    _, err = client.communicate(timeout=300)
    assert "cancelled by root" in err, err
    assert lvs() == {"a", "up"}, lvs()


def an_upload_is_taken_up_again() -> None:
    client = subprocess.Popen(
        ["sh", "-c", f"(head -c 4M {IMAGE}; sleep 600) | virtdctl volume upload --size {SIZE} vg cut -"],
        start_new_session=True,
    )
    until("the upload", lambda: any(job["state"] == "waiting" for job in asked("volume", "jobs")))
    after(KILL)
    os.killpg(client.pid, 9)
    client.wait()
    assert "cut" not in volumes()
    virtdctl("volume", "upload", "--resume", "vg", "cut", IMAGE)
    assert same("cut")
    virtdctl("volume", "delete", "vg", "cut")


def what_others_make_is_seen_and_kept() -> None:
    sh("lvcreate -qq --yes --size 8M --name foreign vg0")
    sh("lvcreate -qq --yes --size 8M --addtag virtd_new --addtag virtd_job_job-00000000 --name left vg0")
    assert set(volumes()) == {"a", "up", "foreign"}, volumes()
    after("systemctl restart virtd")
    until("the sweeping", lambda: lvs() == {"a", "up", "foreign"})
    virtdctl("volume", "delete", "vg", "foreign")


def killed_at_random() -> None:
    for number in range(3):
        script = " && ".join(
            f"virtdctl volume {verb}" for verb in ("create vg new 8M", "resize vg new 12M", "delete vg new")
        )
        client = subprocess.Popen(["sh", "-c", script], stderr=subprocess.PIPE, text=True)
        for turn in range(2):
            time.sleep(0.3 + 0.37 * number + 0.5 * turn)
            sh(KILL, check=False)
        _, err = client.communicate(timeout=600)
        after("true")
        if LATE in err:  # it was asked again once too early, and has done none of the rest
            if "new" in volumes():
                virtdctl("volume", "delete", "vg", "new")
        else:
            assert client.returncode == 0, err
        assert set(volumes()) == {"a", "up"}, volumes()
    until("nothing unfinished", lambda: lvs() == {"a", "up"})
    until("no unit", lambda: sh("systemctl list-units --all --plain --no-legend 'virtd-storage-*.service'") == "")
    assert same("up")
    assert sh("systemctl show -P NFileDescriptorStore virtd.service") == "0"


def a_pool_is_stopped() -> None:
    sh("sleep 600 </dev/vg0/a >/dev/null 2>&1 & echo $! >/run/holder")
    refused("in use", "pool", "stop", "vg")
    assert asked("pool", "info", "vg")["state"] == "active"
    assert same("up"), "the other volumes are as they were"
    sh("kill $(cat /run/holder)")
    virtdctl("pool", "stop", "vg")
    assert sh("lvs --noheadings -o lv_active vg0 | sort -u") == "", "they are active"
    refused("isn't active", "volume", "list", "vg")
    virtdctl("pool", "start", "vg")
    assert volumes()["up"]["trouble"] == ""
    assert same("up")


def nfs() -> None:
    sh("mkdir -p /srv/export && chmod 755 /srv/export")
    Path("/etc/exports").write_text("/srv/export localhost(rw,no_root_squash,no_subtree_check)\n")
    sh("exportfs -ra")
    text = 'name = "nas"\ntype = "filesystem"\npath = "/srv/mounted/nas"\nsource = "localhost:/srv/export"\n'
    virtdctl("pool", "define", "-", stdin=text)
    virtdctl("pool", "start", "nas")
    assert "nosuid" in sh("findmnt -no OPTIONS /srv/mounted/nas")
    virtdctl("volume", "import", "nas", "a", IMAGE, "--from", "raw")
    virtdctl("volume", "clone", "nas", "a", "b")
    virtdctl("volume", "create", "nas", "thin", "1G", "--format", "qcow2")
    assert sh(f"cmp {IMAGE} /srv/export/b") == ""
    for command in (KILL, "systemctl restart virtd"):
        after(command)
        assert asked("pool", "info", "nas")["state"] == "active", command
        assert set(volumes("nas")) == {"a", "b", "thin"}
    virtdctl("volume", "delete", "nas", "a", "b", "thin")
    virtdctl("pool", "stop", "nas")
    assert sh("findmnt /srv/mounted/nas", check=False) == ""
    virtdctl("pool", "undefine", "nas")


def a_crash_of_the_machine_leaves() -> None:
    """Second boot: the first ended without a word in the midst of a clone."""
    after("true")
    until("the autostart", lambda: asked("pool", "info", "vg")["state"] == "active")
    assert set(volumes()) == {"a", "up"}, volumes()
    until("the sweeping", lambda: lvs() == {"a", "up"})
    assert same("up")
    virtdctl("volume", "delete", "vg", "a", "up")
    virtdctl("pool", "stop", "vg")
    virtdctl("pool", "undefine", "vg")
    assert lvs() == set()


FIRST = (
    a_pool_needs_its_group, a_pool_is_started, volumes_are_made, what_cant_be_is_refused, content_comes_and_goes,
    volumes_are_cloned_and_change, a_qcow2_volume_stands_on_a_logical_one, a_guest_has_a_logical_volume,
    a_clone_outlives_the_daemon, a_clone_is_cancelled, an_upload_is_taken_up_again, what_others_make_is_seen_and_kept,
    killed_at_random, a_pool_is_stopped, nfs,
)  # fmt: skip
SECOND = (a_crash_of_the_machine_leaves,)


def ready() -> None:
    """What the steps after the fifth begin with, whatever became of those before: the volumes a and up, whole."""
    for domain in asked("list"):
        virtdctl("stop", domain["name"])
        virtdctl("undefine", domain["name"])
    for job in asked("volume", "jobs"):
        if job["state"] in ("running", "waiting"):
            sh("systemctl kill -s CONT 'virtd-storage-job*'", check=False)
            virtdctl("volume", "cancel", job["job"])
    if not asked("pool", "list"):
        a_pool_is_started()
    if asked("pool", "info", "vg")["state"] != "active":
        virtdctl("pool", "start", "vg")
    if not Path(IMAGE).exists():
        sh(f"head -c {SIZE} /dev/urandom >{IMAGE}")
    there = volumes()
    if more := set(there) - {"a", "up"}:
        virtdctl("volume", "delete", "vg", *more)
    if "a" not in there:
        virtdctl("volume", "create", "vg", "a", "16M")
    if "up" not in there:
        virtdctl("volume", "upload", "vg", "up", IMAGE)


def chosen() -> tuple[list[Callable[[], None]], bool]:
    """The steps that the kernel's command line asks for, virtd.only=WORD,WORD, and whether to crash; else all."""
    found = re.search(r"virtd\.only=(\S+)", Path("/proc/cmdline").read_text())
    if not found:
        return list(FIRST), True
    words = found[1].split(",")
    return [ready, *(step for step in FIRST if any(word in step.__name__ for word in words))], CRASH in words


def run(steps: Iterable[Callable[[], None]]) -> bool:
    good = True
    for step in steps:
        began = time.monotonic()
        name = step.__name__.replace("_", " ")
        try:
            step()
        except Exception as exc:
            good = False
            with contextlib.suppress(Exception):
                ready()
            where = traceback.extract_tb(exc.__traceback__)[1].lineno
            print(f"FAILED {name}, line {where}: {' '.join(str(exc).split())}", flush=True)
        else:
            print(f"ok {name} [{time.monotonic() - began:.0f} s]", flush=True)
    return good


def main() -> None:
    os.makedirs(STATE, exist_ok=True)
    print(flush=True)  # what systemd and the kernel wrote ends here
    if not FIRST_BOOT.exists():
        steps, crash = chosen()
        good = run(steps)
        if not crash:
            print(f"verdict: {'good' if good else 'bad'}", flush=True)
            return
        FIRST_BOOT.write_text("good" if good else "bad")
        try:
            stopped_clone("interrupted")
        finally:
            print("crashing", flush=True)
            time.sleep(1)
            sh("sync; echo 1 >/proc/sys/kernel/sysrq; echo b >/proc/sysrq-trigger")
            time.sleep(60)
    good = run(SECOND) and FIRST_BOOT.read_text() == "good"
    print(f"verdict: {'good' if good else 'bad'}", flush=True)


if __name__ == "__main__":
    main()
