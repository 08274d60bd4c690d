# SPDX-License-Identifier: LGPL-2.1-or-later
"""One guest's QEMU against another's: what a program gets at that has exactly the properties of a guest's unit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Lab
from tests.live.conftest import SUITE
from tests.live.tools import KILL, acl, settings, write

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

PROBE = Path(__file__).with_name("neighbour_probe.py")
DIRECTORY = "/var/lib/virtd/images"
FIRST = 0x78000000
NETWORK = 'name = "lab"\nmode = "isolated"\nbridge = "vl"\n[ipv4]\naddress = "10.9.9.1/24"\n'
# What takes a process, a descriptor or a system call that B's own user is refused as well, by the filter.
REFUSED_TO_ALL = {
    "read_its_memory_by_a_call", "attach_by_ptrace", "take_one_of_its_descriptors", "change_its_priority",
    "choose_its_cpus",
}  # fmt: skip
AS_B = {
    "see_its_process", "read_its_memory", "read_its_environment", "list_its_descriptors", "enter_its_root",
    "speak_qmp_through_its_root", "signal_it", "signal_it_by_a_pidfd", "open_its_disk_through_its_root",
}  # fmt: skip


@pytest.fixture
def two(lab: Lab) -> Iterator[Lab]:
    """Guests `a` and `b` that run, each with a disk of its own, in one network."""
    lab.sh(f"mkdir -p {DIRECTORY} && cd {DIRECTORY} && truncate -s 8M a.raw b.raw && chmod 600 *.raw")
    lab.virtdctl("network", "define", "-", stdin=NETWORK)
    for name in ("a", "b"):
        more = f'[[disk]]\npath = "{DIRECTORY}/{name}.raw"\n[[nic]]\nnetwork = "lab"\n'
        lab.define(name, more=more, start=True)
    yield lab
    lab.undefine_all()
    assert lab.sh(f"stat -c '%U:%G %a' {DIRECTORY}/*.raw") == "root:root 600\n" * 2
    lab.sh(f"rm {DIRECTORY}/*.raw")
    assert lab.sh("ls /run/userdb") == ""


def target(lab: Lab) -> dict[str, Any]:
    """What the probe has to know of guest b."""
    pid = lab.info("b")["pid"]
    return {
        "pid": pid,
        "uid": int(lab.sh(f"stat -c %u /proc/{pid}")),
        "runtime": "/run/virtd/qemu/b",
        "disk": f"{DIRECTORY}/b.raw",
        "tap": "vt-b-0",
    }


def probe(lab: Lab, target: dict[str, Any], **changes: str | int | None) -> set[str]:
    """Run the probe as a service with the properties of a's unit; which tries worked. `changes`: of properties."""
    shared = lab.sh("ipcmk -M 4096 -p 0666").split()[-1]
    key = int(lab.sh(f"ipcs -m | awk '$2 == {shared} {{ print $1 }}'").strip(), 16)
    unit = lab.sh("cat /run/systemd/transient/virtd-qemu-a.service")
    lab.run(
        "sh",
        "-c",
        "cat >/usr/local/lib/virtd-probe.py; chmod 644 /usr/local/lib/virtd-probe.py",
        stdin=PROBE.read_text(),
    )
    # What a shell would take for its own is quoted by systemd's rules, of which these words need none.
    arguments = json.dumps(target | {"key": key}).replace('"', "\\x22").replace(" ", "")
    ours = (
        "ExecStart",
        "ExecStop",
        "StandardInput",
        "StandardOutput",
        "StandardError",
        "RefuseManualStart",
        *changes,
    )
    lines = [line for line in unit.splitlines() if line.partition("=")[0] not in ours]
    section = lines.index("[Service]") + 1
    more = [f"{name}={value}" for name, value in changes.items() if value is not None]
    lines[section:section] = [
        f"ExecStart=/usr/bin/python3 -IS /usr/local/lib/virtd-probe.py {arguments}",
        "StandardOutput=truncate:/run/probe.out",
        "StandardError=truncate:/run/probe.err",
        *more,
    ]
    write(
        lab, "/run/systemd/system/virtd-probe.service", "\n".join(lines).replace("Type=exec", "Type=oneshot") + "\n"
    )
    try:
        lab.sh("systemctl daemon-reload; systemctl start virtd-probe.service", check=False)
        said = lab.sh("cat /run/probe.out")
        assert said, lab.sh("cat /run/probe.err; systemctl status --no-pager virtd-probe.service", check=False)
    finally:
        lab.sh("systemctl stop virtd-probe.service; rm -f /run/systemd/system/virtd-probe.service /run/probe.*")
        lab.sh(f"systemctl daemon-reload; rm -f /usr/local/lib/virtd-probe.py; ipcrm -m {shared}")
    results: dict[str, bool] = json.loads(said)
    return {name for name, worked in results.items() if worked}


def test_one_guests_qemu_gets_at_nothing_of_another(two: Lab) -> None:
    lab, b = two, target(two)
    assert probe(lab, b) == set()
    # Without what systemd before 257 hasn't, and without any view of its own: being another user has to do.
    alone = probe(lab, b, PrivatePIDs=None, ProtectProc=None, ProcSubset=None, TemporaryFileSystem=None)
    assert alone <= {"see_its_process", "speak_to_the_host"}, alone
    # As b's own user it would get at all of that: these tries can work.
    as_b = probe(lab, b, PrivatePIDs=None, ProtectProc=None, ProcSubset=None, User=b["uid"], Group=b["uid"])
    assert as_b >= AS_B, AS_B - as_b
    assert not as_b & REFUSED_TO_ALL
    after = lab.info("b")
    assert (after["state"], after["pid"]) == ("running", b["pid"])


def test_a_tap_is_its_guests_also_when_that_has_ended(two: Lab) -> None:
    lab, b = two, target(two)
    lab.sh(f"systemctl stop virtd.socket virtd.service; kill -9 {b['pid']}")
    try:
        lab.sh("ip link show vt-b-0")
        assert "take_its_tap" not in probe(lab, b)
        assert "take_its_tap" in probe(lab, b, User=b["uid"], Group=b["uid"])
    finally:
        lab.sh("systemctl start virtd.socket virtd.service")
    lab.wait("its end", lambda: lab.info("b")["state"] == "crashed")
    lab.wait("its tap's end", lambda: lab.sh("ls /sys/class/net | grep vt-b", check=False) == "")


def test_a_tap_with_anothers_address_is_put_out(two: Lab) -> None:
    """Whoever has a tap open can give it any address, without any capability: SIOCSIFHWADDR, drivers/net/tun.c."""
    lab, mac = two, two.info("b")["nics"][0]["mac"]

    def b_is_reached() -> str:
        return lab.sh(f"bridge fdb show dev vt-b-0 | grep '{mac}.*static'", check=False)

    def at_home() -> bool:
        return not lab.sh("readlink /sys/class/net/vt-a-0/master", check=False) and bool(b_is_reached())

    assert b_is_reached()
    lab.sh(f"ip link set vt-a-0 address {mac}")
    lab.wait("a out of the bridge, and b's address its own", at_home, 20)
    [problem] = json.loads(lab.virtdctl("status", "--json", check=False).stdout)["problems"]
    assert "qemu/a gave its interface vt-a-0 another MAC address" in problem["text"]
    # Also if nobody is there at that moment; and it is no matter of a's alone any more.
    lab.virtdctl("stop", "a")
    assert lab.json("status")["problems"] == []
    lab.virtdctl("start", "a")
    assert "vt-a-0" in lab.sh("ls /sys/class/net/vl/brif")
    lab.sh(f"systemctl stop virtd.socket virtd.service; ip link set vt-a-0 address {mac}")
    try:
        assert not b_is_reached()
    finally:
        lab.sh("systemctl start virtd.socket virtd.service")
    lab.wait("the same, later", at_home, 20)


def test_a_user_for_each(two: Lab) -> None:
    lab = two
    pids = {name: lab.info(name)["pid"] for name in ("a", "b")}
    assert lab.sh(f"ps -o user:20= -p {pids['a']},{pids['b']}").split() == ["vm-a", "vm-b"]
    uids = {name: int(lab.sh(f"stat -c %u /proc/{pid}")) for name, pid in pids.items()}
    assert len(set(uids.values())) == 2
    assert all(FIRST <= uid < FIRST + 65536 for uid in uids.values())
    for name, uid in uids.items():
        owned = f"stat -c %U:%G:%u:%g {DIRECTORY}/{name}.raw /run/virtd/qemu/{name}"
        # In its directory it may reach its sockets, and make nothing.
        assert lab.sh(owned).split() == [f"vm-{name}:vm-{name}:{uid}:{uid}", f"root:vm-{name}:0:{uid}"]
        assert lab.sh(f"cat /sys/class/net/vt-{name}-0/owner").strip() == str(uid)
        assert lab.sh(f"getent passwd {uid}").startswith(f"vm-{name}:x:{uid}:{uid}:Domain {name} of virtd:/:")
        assert lab.sh(f"id -Gn vm-{name}").strip() == f"vm-{name}"
    assert lab.virtdctl("fsck").returncode == 0
    # It keeps it over a restart of its own and of the daemon, and a name that got lost is made anew.
    lab.sh(f"{KILL}; rm -r /run/userdb")
    lab.wait("its name", lambda: lab.sh("ls /run/userdb", check=False).count("vm-") == 4)
    lab.virtdctl("stop", "a")
    assert "vm-a" not in lab.sh("ls /run/userdb")
    lab.virtdctl("start", "a")
    assert int(lab.sh(f"stat -c %u /proc/{lab.info('a')['pid']}")) == uids["a"]
    # One that has another definition meanwhile, and is another domain, gets another.
    lab.virtdctl("stop", "a")
    lab.virtdctl("undefine", "a")
    lab.define("a", start=True)
    assert int(lab.sh(f"stat -c %u /proc/{lab.info('a')['pid']}")) not in uids.values()


def test_the_host_going_down_asks_it(two: Lab) -> None:
    """ExecStop= of its unit runs as the same user, without virtd."""
    lab = two
    lab.wait_ready("a")
    lab.sh("systemctl stop virtd.socket virtd.service")
    lab.sh("systemctl stop virtd-qemu-a.service")
    lab.sh("systemctl start virtd.socket virtd.service")
    lab.wait("its end", lambda: lab.info("a")["state"] == "stopped")
    assert lab.info("a")["exit"]["cause"] == "host-shutdown"


def test_fsck_knows_of_users(two: Lab) -> None:
    lab = two
    lab.sh("rm /run/userdb/vm-a.group; cd /run/userdb && sed 's/vm-b/vm-gone/' vm-b.user >vm-gone.user")
    found = lab.virtdctl("fsck", check=False).stdout
    assert "vm-a" in found
    assert "vm-gone" in found
    lab.virtdctl("fsck", "--repair", check=False)
    assert lab.virtdctl("fsck").returncode == 0
    assert sorted(lab.sh("ls /run/userdb | grep vm-").split()) == [
        "vm-a.group", "vm-a.user", "vm-b.group", "vm-b.user",
    ]  # fmt: skip


def test_limits_and_what_is_filtered(two: Lab) -> None:
    lab = two
    shown = lab.sh("systemctl show virtd-qemu-a.service")
    values = dict(line.partition("=")[::2] for line in shown.splitlines())
    assert int(values["TasksMax"]) == 1 + 256
    mib = 1 << 20
    assert int(values["MemoryMax"]) == 96 * mib + 96 * mib // 128 + 64 * mib + 8 * mib + 1024 * mib + 1024 * mib
    assert (values["PrivateIPC"], values["RemoveIPC"], values["KeyringMode"]) == ("yes", "yes", "private")
    assert values["PrivatePIDs" if SUITE != "bookworm" else "ProtectProc"] in ("yes", "invisible")
    assert "ptrace" not in values["SystemCallFilter"].split()
    score = lab.sh("systemd-analyze security --no-pager virtd-qemu-a.service | tail -1")
    found = re.search(r"service: ([0-9.]+) ", score)
    assert found is not None
    assert float(found[1]) <= 2.5, score


def test_a_file_that_two_read(lab: Lab) -> None:
    iso = f"{DIRECTORY}/both.iso"
    lab.sh(f"mkdir -p {DIRECTORY} && truncate -s 1M {iso} && chown root:root {iso} && chmod 600 {iso}")
    try:
        for name in ("a", "b"):
            lab.define(name, more=f'[[cdrom]]\npath = "{iso}"\n', start=True)
        for name in ("a", "b"):
            assert f"user:vm-{name}:r--" in acl(lab, iso)
        assert lab.sh(f"stat -c %U:%G {iso}") == "root:root\n"
        lab.virtdctl("stop", "a")
        assert acl(lab, iso) == ["user:vm-b:r--"]
        # The daemon is killed, and the guest ends meanwhile.
        pid = lab.info("b")["pid"]
        lab.sh(
            f"systemctl stop virtd.socket virtd.service; kill -9 {pid}; systemctl start virtd.socket virtd.service"
        )
        lab.wait("its file's return", lambda: acl(lab, iso) == [])
        assert lab.sh(f"stat -c '%U:%G %a' {iso}") == "root:root 600\n"
    finally:
        lab.undefine_all()
        lab.sh(f"rm {iso}")


def test_one_user_for_all_if_asked_for(lab: Lab) -> None:
    with settings(lab, '[qemu]\nuser = "virtd-qemu"\n'):
        lab.define("a", start=True)
        assert lab.sh(f"stat -c %U /proc/{lab.info('a')['pid']}").strip() == "virtd-qemu"
        lab.virtdctl("stop", "a")
    assert lab.sh("ls /run/userdb", check=False) == ""


def test_a_host_that_cant_name_users_says_so(lab: Lab) -> None:
    lab.sh("cp /etc/nsswitch.conf /root; sed -i 's/ systemd//' /etc/nsswitch.conf")
    try:
        lab.define("a")
        refused = lab.virtdctl("start", "a", check=False)
        assert refused.returncode == 1
        assert "doesn't know its user vm-a" in refused.stderr
        assert "libnss-systemd" in refused.stderr
    finally:
        lab.sh("cp /root/nsswitch.conf /etc/nsswitch.conf")
    lab.virtdctl("start", "a")
    lab.virtdctl("stop", "a")
