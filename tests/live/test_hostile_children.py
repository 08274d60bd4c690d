# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that floods, and children that put odd files where the daemon looks: nobody else notices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness import definition

if TYPE_CHECKING:
    from tests.harness import Lab

pytestmark = pytest.mark.live

MEMORY = 8 << 20  # bytes that the daemon may have more of after a flood than before
# mov dx, 0x505; mov al, 2; out dx, al; jmp back to out: GUEST_CRASHLOADED in a loop.
FLOOD = "ba0505b002eeebfd"
# The same 60,000 times (mov ecx, 60000; ... dec ecx; jnz), and then power off: mov dx, 0x604; mov ax, 0x2000; out.
FLOOD_AND_OFF = "ba0505b00266b960ea0000ee664975fbba0406b80020efebfe"

LEASES = "/var/lib/virtd/network/lab/leases"
ODD = {
    "fifo": "mkfifo {}",
    "zero": "ln -s /dev/zero {}",
    "loop": "ln -s loop {}",
    "directory": "mkdir {}",
    "socket": "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"{}\")'",
    "device": "mknod {} c 1 5",
    "holes": "truncate -s 10G {}",
}


def boot_sector(lab: Lab, name: str, code: str) -> None:
    lab.sh(f"mkdir -p /srv/boot; python3 -c \"import os; os.write(1, bytes.fromhex('{code}').ljust(510, b'\\\\0') "
           f"+ b'\\\\x55\\\\xaa' + bytes(1 << 20))\" > /srv/boot/{name}.img")  # fmt: skip
    text = f'name = "{name}"\nmemory = "64M"\n[[disk]]\npath = "/srv/boot/{name}.img"\nformat = "raw"\n'
    lab.write(f"/tmp/{name}.toml", text)
    lab.virtdctl("define", f"/tmp/{name}.toml")


def resident(lab: Lab) -> int:
    return int(lab.sh(f"awk '/^VmRSS/ {{print $2}}' /proc/{lab.main_pid()}/status")) << 10


def test_a_flood_of_events_costs_a_bounded_amount(lab: Lab) -> None:
    boot_sector(lab, "flood", FLOOD)
    lab.virtdctl("start", "flood")
    lab.wait("the flood to be noticed", lambda: lab.info("flood")["events"]["hung_up"], 90)
    before = resident(lab)
    for _ in range(20):
        lab.virtdctl("suspend", "flood")
        lab.wait("it to be paused", lambda: lab.info("flood")["state"] == "paused")
        lab.virtdctl("resume", "flood")
    assert resident(lab) - before < MEMORY
    assert int(lab.sh("du -sk /run/virtd | cut -f1")) < 4096
    said = "more events than virtd takes"
    lab.wait("the problem", lambda: said in lab.virtdctl("status", check=False).stdout, 90)
    lab.virtdctl("stop", "flood")
    lab.sh("rm -r /srv/boot")


def test_what_ended_a_guest_that_flooded_while_nobody_was_there(lab: Lab) -> None:
    boot_sector(lab, "web1", FLOOD_AND_OFF)
    lab.virtdctl("start", "web1")
    pid = lab.info("web1")["pid"]
    lab.sh("systemctl stop virtd.socket virtd.service")
    lab.wait("its end", lambda: lab.sh(f"test -e /proc/{pid} || echo gone", check=False) == "gone\n", 120)
    lab.sh("systemctl start virtd.socket virtd.service")
    info = lab.info("web1")
    assert (info["state"], info["exit"]["cause"], info["reason"]) == (
        "stopped",
        "guest-shutdown",
        "powered off by itself",
    )
    lab.sh("rm -r /srv/boot")


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_where_children_write(lab: Lab, kind: str) -> None:
    """As if a child had made them before it was kept from making any."""
    lab.define("web1", start=True)
    lab.write("/tmp/lab.toml", 'name = "lab"\nmode = "isolated"\n[ipv4]\naddress = "192.168.150.1/24"\n')
    lab.virtdctl("network", "define", "/tmp/lab.toml")
    lab.virtdctl("network", "start", "lab")
    try:
        pid = lab.info("web1")["pid"]
        paths = [
            "/run/virtd/qemu/web1/qmp.sock",
            "/run/virtd/qemu/web1/events.out",
            "/var/lib/virtd/network/lab/leases",
        ]
        for path in paths:
            lab.sh(f"rm -f {path}; " + ODD[kind].format(path))
        lab.sh("systemctl restart virtd")
        assert lab.info("web1")["pid"] == pid
        assert lab.json("network", "leases", "lab") == []
        assert "broke off" not in lab.virtdctl("suspend", "web1", check=False).stderr
        lab.virtdctl("stop", "web1")
        assert lab.info("web1")["exit"]["cause"] == "stop"
    finally:
        lab.virtdctl("network", "stop", "lab", check=False)
        lab.virtdctl("network", "undefine", "lab", check=False)


def test_a_link_to_anothers_monitor(lab: Lab) -> None:
    lab.define("web1", start=True)
    lab.define("web2", start=True)
    lab.sh("cd /run/virtd/qemu/web1; rm qmp.sock; ln -s ../web2/shutdown.sock qmp.sock; systemctl restart virtd")
    refused = lab.virtdctl("suspend", "web1", check=False)
    assert refused.returncode != 0
    assert "a link" in refused.stderr
    assert [lab.info(name)["state"] for name in ("web1", "web2")] == ["running", "running"]
    lab.virtdctl("stop", "web1")
    assert lab.info("web2")["state"] == "running"


def test_a_guests_directory_is_not_its_own_any_more(lab: Lab) -> None:
    lab.write("/tmp/web1.toml", definition("web1", more="[vnc]\nenabled = true\n"))
    lab.virtdctl("define", "/tmp/web1.toml")
    lab.virtdctl("start", "web1")
    owner, mode = lab.sh("stat -c '%U %a' /run/virtd/qemu/web1").split()
    assert (owner, mode) == ("root", "710")
    assert lab.sh("ls /run/virtd/qemu/web1").split() == ["qmp.sock", "shutdown.sock", "vnc.sock"]
    user = lab.sh("stat -c %u /run/virtd/qemu/web1/qmp.sock").strip()
    tried = lab.sh(
        f"setpriv --reuid {user} --regid {user} --clear-groups touch /run/virtd/qemu/web1/x 2>&1", check=False
    )
    assert "denied" in tried
    # And its ExecStop reaches it all the same.
    lab.wait_ready("web1")
    lab.sh("systemctl stop virtd-qemu-web1")
    lab.wait("its end", lambda: lab.info("web1")["state"] == "stopped")
    assert lab.info("web1")["exit"]["cause"] == "host-shutdown"
