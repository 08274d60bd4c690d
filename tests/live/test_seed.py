# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest's own system is set up with, as the guest finds it."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest

from tests.harness import definition
from tests.live.networks import run
from tests.live.tools import write

if TYPE_CHECKING:
    from tests.harness import Lab

pytestmark = pytest.mark.live

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJqpi6BXsJzWt9i7jSYLLz9pLnKOBUPFjMZ6ZIvFGD8q me@example.org"
SECRET = "correct-horse-battery"
USER_DATA = "/root/user-data"
SEED = "/run/virtd/qemu/web1/provided/seed.iso"
DISK = '[[disk]]\npath = "/root/disk.raw"\n'
GUEST = f"""
[guest]
hostname = "web1.example.org"
ssh_keys = ["{KEY}"]
user_data = "{USER_DATA}"
"""
# The guest's disks are named in the order of their slots, so the volume is the last.
MOUNT = "mkdir -p /tmp/seed; mount -t iso9660 /dev/vdb /tmp/seed -o ro"


def test_cloud_init(lab: Lab) -> None:
    """The volume is there, whole and read-only, and gone with the guest, whichever daemon sees the end."""
    write(lab, USER_DATA, f"#cloud-config\npassword: {SECRET}\n")
    lab.sh(f"chmod 600 {USER_DATA}; truncate -s 1M /root/disk.raw")
    lab.virtdctl("define", "-", stdin=definition("web1", more=DISK + GUEST))
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    info = lab.info("web1")
    pid, uuid = info["pid"], info["uuid"]
    assert info["guest"] == {"cloud_init": ["meta-data", "user-data"], "credentials": [], "ignition": False}
    assert {"id": "seed0", "what": "", "bus": "pcie.0", "slot": 30} in info["hardware"]["devices"]
    # What the host's own tools make of it.
    assert {"LABEL=cidata", "TYPE=iso9660"} <= set(lab.sh(f"blkid -p -o export {SEED}").split())
    # The guest's, by both of its trees.
    for option in ("", ",nojoliet"):
        status, said = run(lab, "web1", f"{MOUNT}{option} && ls /tmp/seed && cat /tmp/seed/meta-data")
        assert status == 0, said
        assert said.splitlines() == [
            "meta-data",
            "user-data",
            f'instance-id: "{uuid}"',
            'local-hostname: "web1.example.org"',
            "public-keys:",
            f'- "{KEY}"',
        ]
        status, said = run(lab, "web1", "cat /tmp/seed/user-data; umount /tmp/seed")
        assert said.splitlines() == ["#cloud-config", f"password: {SECRET}"]
    assert run(lab, "web1", "dd if=/dev/zero of=/dev/vdb bs=2048 count=1")[0] != 0
    # Nobody else sees the secret.
    assert SECRET not in lab.sh(f"cat /proc/{pid}/cmdline /proc/{pid}/environ | tr '\\0' ' '; ps -eww -o args")
    group = lab.sh(f"stat -c %g /proc/{pid}").strip()
    assert lab.sh(f"stat -c '%u %g %a' {SEED}").split() == ["0", group, "440"]
    assert lab.sh(f"setpriv --reuid 65534 --regid 65534 --clear-groups cat {SEED}", check=False) == ""
    # The file that it was made of may go, and the daemon as well.
    lab.sh(f"rm {USER_DATA}; systemctl kill -s KILL virtd; systemctl restart virtd")
    assert lab.info("web1")["pid"] == pid
    assert lab.json("fsck")["differences"] == []
    status, said = run(lab, "web1", f"{MOUNT} && cat /tmp/seed/user-data")
    assert SECRET in said
    lab.sh("systemctl stop virtd.socket virtd; systemctl kill -s KILL virtd-qemu-web1; systemctl start virtd")
    lab.wait("its end", lambda: lab.info("web1")["pid"] is None, 60)
    assert lab.sh("ls /run/virtd/qemu").split() == ["web1.json"]
    said_again = lab.virtdctl("start", "web1", check=False)
    assert said_again.returncode != 0
    assert f"guest.user_data: no such file: {USER_DATA}" in said_again.stderr
    lab.virtdctl("undefine", "web1")
    lab.sh("rm /root/disk.raw")


def test_credentials_and_ignition(lab: Lab) -> None:
    """systemd and Ignition would find them; nobody on the host sees them in an argument."""
    write(lab, "/root/secret", f"{SECRET}\n")
    write(lab, "/root/config.ign", '{"ignition": {"version": "3.4.0"}}\n')
    lab.sh("chmod 600 /root/secret /root/config.ign")
    more = (
        '[guest]\nignition = "/root/config.ign"\n'
        '[guest.credentials]\nword = "/root/secret"\n"ssh.authorized_keys.root" = "/root/secret"\n'
    )
    lab.virtdctl("define", "-", stdin=definition("web1", more=more))
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    info = lab.info("web1")
    pid = info["pid"]
    assert info["guest"] == {"cloud_init": [], "credentials": ["word", "ssh.authorized_keys.root"], "ignition": True}
    encoded = base64.b64encode(f"{SECRET}\n".encode()).decode()
    strings = "tr '\\0' '\\n' </sys/firmware/dmi/entries/11-0/raw | grep -ao 'io.systemd.*'"
    _status, said = run(lab, "web1", strings)
    assert said.splitlines() == [
        f"io.systemd.credential.binary:{name}={encoded}" for name in ("word", "ssh.authorized_keys.root")
    ]
    config = "/sys/firmware/qemu_fw_cfg/by_name/opt/com.coreos/config/raw"
    assert run(lab, "web1", f"cat {config}") == (0, '{"ignition": {"version": "3.4.0"}}')
    seen = lab.sh(f"cat /proc/{pid}/cmdline /proc/{pid}/environ | tr '\\0' ' '; ps -eww -o args")
    assert SECRET not in seen
    assert encoded not in seen
    assert lab.sh("stat -c '%u %a' /run/virtd/qemu/web1/provided/*").split() == ["0", "440"] * 2
    # Its sandbox shows QEMU the copies, and not what they were made of.
    inside = f"nsenter -t {pid} -m ls"
    assert lab.sh(f"{inside} /run/virtd/qemu/web1/provided").split() == ["ignition", "smbios"]
    assert lab.sh(f"{inside} /root").split() == []
    lab.sh("systemctl kill -s KILL virtd; systemctl restart virtd")
    assert lab.info("web1")["pid"] == pid
    lab.virtdctl("stop", "web1")
    assert lab.sh("ls /run/virtd/qemu").split() == ["web1.json"]
    lab.virtdctl("undefine", "web1")
    lab.sh("rm /root/secret /root/config.ign")
