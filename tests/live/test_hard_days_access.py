# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest may not use, or isn't there: each time it is said whose it is and what helps, and that does help."""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING

import pytest

from tests.harness import Lab, definition
from tests.live.networks import define, network

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live


def given(lab: Lab, more: str) -> None:
    lab.virtdctl("define", "-", stdin=definition("web1", more=more))


def refused(lab: Lab, *told: str) -> str:
    """Its start is, with all of these words; the hint."""
    done = lab.virtdctl("start", "web1", check=False)
    assert done.returncode == 1, "web1 was to be refused"
    for words in told:
        assert words in done.stderr, done.stderr
    return done.stderr.partition("Hint: ")[2]


def started(lab: Lab) -> None:
    lab.virtdctl("start", "web1")
    lab.virtdctl("stop", "web1")


@contextlib.contextmanager
def configured(lab: Lab, text: str) -> Iterator[None]:
    lab.write("/etc/virtd/virtd.toml", text)
    lab.sh("systemctl restart virtd.service")
    try:
        yield
    finally:
        lab.sh("rm /etc/virtd/virtd.toml; systemctl restart virtd.service")


def test_files_whose_owner_cannot_be_changed(lab: Lab) -> None:
    lab.sh(
        "mkdir -p /srv/isos /mnt/isos; head -c 1M /dev/zero >/srv/isos/a.iso; chmod 640 /srv/isos/a.iso; "
        "mount --bind /srv/isos /mnt/isos; mount -o remount,ro,bind /mnt/isos"
    )
    try:
        given(lab, '[[cdrom]]\npath = "/mnt/isos/a.iso"\n')
        assert "chmod o+r the file where that can be written" in refused(lab, "read /mnt/isos/a.iso: Read-only")
        lab.sh("chmod o+r /srv/isos/a.iso")
        started(lab)
        given(lab, '[[disk]]\npath = "/mnt/isos/a.iso"\n')
        assert "readonly = true" in refused(lab, "disk[0].path", "mounted read-only")
        given(lab, '[[disk]]\npath = "/mnt/isos/a.iso"\nreadonly = true\n')
        started(lab)
    finally:
        lab.sh("umount /mnt/isos; rm -rf /srv/isos /mnt/isos")


def test_a_disk_in_memory(lab: Lab) -> None:
    """In /dev, but a file."""
    lab.sh("truncate -s 8M /dev/shm/a.raw")
    try:
        given(lab, '[[disk]]\npath = "/dev/shm/a.raw"\nformat = "raw"\n')
        started(lab)
    finally:
        lab.sh("rm /dev/shm/a.raw")


def test_a_directory_that_is_closed(lab: Lab) -> None:
    """Where it is hidden from guests anyway it doesn't matter; elsewhere the way is told."""
    lab.sh("for d in /srv/closed /usr/closed; do mkdir -m 700 $d; head -c 1M /dev/zero >$d/a.iso; done")
    try:
        given(lab, '[[cdrom]]\npath = "/srv/closed/a.iso"\n')
        started(lab)
        given(lab, '[[cdrom]]\npath = "/usr/closed/a.iso"\n')
        hint = refused(lab, "may not pass /usr/closed", "root:root", "mode 0700")
        lab.sh(hint.rstrip(".\n"))
        started(lab)
    finally:
        lab.sh("rm -rf /srv/closed /usr/closed")


def test_a_drive_without_a_medium(lab: Lab) -> None:
    for table in ('[[cdrom]]\npath = "/srv/gone.iso"\n', "[[cdrom]]\n"):
        given(lab, table)
        lab.virtdctl("start", "web1")
        assert lab.info("web1")["cdroms"] == [None]
        assert "cdrom[0], without a medium" in lab.virtdctl("info", "web1").stdout
        lab.wait_ready("web1")
        problems = [problem["text"] for problem in lab.info("web1")["problems"]]
        assert problems == (["cdrom[0] is empty, no such file: /srv/gone.iso"] if "path" in table else [])
        lab.virtdctl("stop", "web1")


def test_a_tap_that_guests_may_not_open(lab: Lab) -> None:
    define(lab, network("lab", 50))
    given(lab, '[[nic]]\nnetwork = "lab"\n')
    try:
        for owner, mode in (("root:root", "0600"), ("root:12345", "0660")):
            lab.sh(f"chown {owner} /dev/net/tun; chmod {mode} /dev/net/tun")
            hint = refused(lab, f"/dev/net/tun: it is {owner}'s, with mode {mode}")
            lab.sh(hint.partition(";")[0])
            started(lab)
        lab.sh("chown root:kvm /dev/net/tun; chmod 660 /dev/net/tun")
        started(lab)
    finally:
        lab.sh("chown root:root /dev/net/tun; chmod 666 /dev/net/tun")


def test_a_kvm_that_guests_may_not_open(lab: Lab) -> None:
    """There is no KVM in a lab: this is only as much of one as is looked at before QEMU."""
    given(lab, "")
    lab.sh("mknod -m 600 /dev/kvm c 1 3")
    try:
        hint = refused(lab, "may not open /dev/kvm: it is root:root's, with mode 0600")
        lab.sh(";".join(hint.split(";")[:2]))
        assert lab.sh("stat -c '%G %a' /dev/kvm") == "kvm 660\n"
        assert "may not open" not in lab.virtdctl("start", "web1", check=False).stderr
    finally:
        lab.sh("rm /dev/kvm")


def test_a_qemu_elsewhere(lab: Lab) -> None:
    """It runs from where others' sandboxes hide it, also by a link; and it is said why it can't be run."""
    lab.sh(
        "mkdir -p /opt/qemu/bin /srv/q; cp $(command -v qemu-system-x86_64) /opt/qemu/bin/qemu; "
        "mkdir /opt/qemu/share; cp -rL /usr/share/qemu /usr/share/seabios /opt/qemu/share; "
        "for m in /usr/lib/*/qemu; do to=/opt/qemu/${m#/usr/}; test ! -d $m || "
        "{ mkdir -p $to; cp -r $m/. $to; }; done; "
        "ln -s /opt/qemu/bin/qemu /srv/q/link"
    )
    given(lab, "")
    try:
        for path in ("/opt/qemu/bin/qemu", "/srv/q/link"):
            with configured(lab, f'[qemu]\nbinary = "{path}"\n'):
                lab.virtdctl("start", "web1")
                exe = lab.sh(f"readlink /proc/{lab.info('web1')['pid']}/exe").strip()
                assert exe == "/opt/qemu/bin/qemu"
                lab.virtdctl("stop", "web1")
        with configured(lab, '[qemu]\nbinary = "/opt/qemu/bin/qemu"\n'):
            for spoil, told in (
                ("chmod 700 /opt/qemu", "may not pass /opt/qemu"),
                ("chmod 700 /opt/qemu/bin/qemu", "may not execute /opt/qemu/bin/qemu"),
                ("chmod 777 /opt/qemu", "/opt/qemu can be written by everybody"),
            ):
                lab.sh(spoil)
                refused(lab, told)
                lab.sh("chmod 755 /opt/qemu /opt/qemu/bin/qemu")
            started(lab)
    finally:
        lab.sh("rm -rf /opt/qemu /srv/q")


def test_a_dnsmasq_that_its_sandbox_hides(lab: Lab) -> None:
    lab.sh("mkdir -p /srv/d /opt/d; for d in /srv/d /opt/d; do cp $(command -v dnsmasq) $d; done")
    define(lab, network("lab", 50), start=False)
    try:
        with configured(lab, '[dnsmasq]\nbinary = "/srv/d/dnsmasq"\n'):
            said = lab.virtdctl("network", "start", "lab", check=False).stderr
            assert "its sandbox hides that directory" in said
        with configured(lab, '[dnsmasq]\nbinary = "/opt/d/dnsmasq"\n'):
            lab.virtdctl("network", "start", "lab")
            pid = lab.json("network", "info", "lab")["pid"]
            assert lab.sh(f"readlink /proc/{shlex.quote(str(pid))}/exe") == "/opt/d/dnsmasq\n"
            lab.virtdctl("network", "stop", "lab")
    finally:
        lab.sh("rm -rf /srv/d /opt/d")
