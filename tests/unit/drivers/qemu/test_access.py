# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest's user may not use is said in words that help: devices, QEMU's own program, files and their ways."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from virtd import errors
from virtd.drivers.network import prerequisites as networks
from virtd.drivers.qemu import access, ownership, prerequisites
from virtd.drivers.qemu.ownership import Given
from virtd.drivers.qemu.prerequisites import Account
from virtd.model.settings import Dnsmasq

WHO = Account("vm-web1", "vm-web1", 2013265920, 2013265920, (), own=True)
NAMELESS = 3999999999


def device(monkeypatch: pytest.MonkeyPatch, mode: int, gid: int = 0) -> None:
    """Every path is a device of root's and that group."""
    status = os.stat_result((stat.S_IFCHR | mode, 0, 0, 1, 0, gid, 0, 0, 0, 0))
    monkeypatch.setattr(os, "stat", lambda _path: status)


@pytest.mark.parametrize("path", [prerequisites.KVM, prerequisites.TUN])
def test_devices_that_are_not_for_guests(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use = {"kvm": path == prerequisites.KVM, "tap": path == prerequisites.TUN}
    for mode, gid, whose in ((0o600, 0, "root:root"), (0o660, NAMELESS, f"root:{NAMELESS}"), (0o060, 0, "root:root")):
        device(monkeypatch, mode, gid)
        with pytest.raises(errors.HostError, match=f"vm-web1.* may not open {path}: it is {whose}'s") as caught:
            access.require_devices(WHO, **use)
        assert f"with mode {mode:04o}" in caught.value.message
        assert "chmod 66" in str(caught.value.hint)
        assert "udev" in str(caught.value.hint)
        access.require_devices(WHO, kvm=False, tap=False)
    device(monkeypatch, 0o666)
    access.require_devices(WHO, **use)
    device(monkeypatch, 0o660, WHO.gid)
    access.require_devices(WHO, **use)


def test_virtd_itself_may_open_them() -> None:
    """By the numbers of the kernel's (linux/miscdevice.h), for a path has to be there: /dev/kvm, /dev/vhost-net."""
    unit = (Path(__file__).parents[4] / "units/virtd.service").read_text()
    allowed = {line.removeprefix("DeviceAllow=") for line in unit.splitlines() if line.startswith("DeviceAllow=")}
    assert "DevicePolicy=closed" in unit
    assert {"/dev/char/10:232 rw", "/dev/char/10:238 rw", "/dev/net/tun rw"} <= allowed


def test_a_qemu_of_somebodys_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown are its directory, or what is above its bin, and where a link to it leads."""
    os.chmod(tmp_path, 0o755)
    for name in ("q/bin", "plain"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("q/bin/qemu", "plain/qemu"):
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "link").symlink_to("q/bin/qemu")
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chmod(path, 0o755)
    top = str(tmp_path).split("/")[1]
    monkeypatch.setattr("virtd.reach.reached", lambda path: Reached(path))
    assert access.shown(f"{tmp_path}/q/bin/qemu", [top], WHO) == [f"{tmp_path}/q"]
    assert access.shown(f"{tmp_path}/plain/qemu", [top], WHO) == [f"{tmp_path}/plain"]
    assert access.shown(f"{tmp_path}/link", [top], WHO) == [str(tmp_path), f"{tmp_path}/q"]
    assert access.shown(f"{tmp_path}/q/bin/qemu", ["srv"], WHO) == [], "it is seen anyway"
    (tmp_path / "q/bin").chmod(0o700)
    with pytest.raises(errors.HostError, match=rf"may not pass {tmp_path}/q/bin .* with mode 0700") as caught:
        access.shown(f"{tmp_path}/q/bin/qemu", [top], WHO)
    assert caught.value.hint == f"chmod o+x {tmp_path}/q/bin"
    (tmp_path / "plain/qemu").chmod(0o700)
    with pytest.raises(errors.HostError, match="may not execute"):
        access.shown(f"{tmp_path}/plain/qemu", [top], WHO)


class Reached:
    """reach.reached() in a directory of everybody's."""

    def __init__(self, path: str) -> None:
        self.itself, self.status = path, os.stat(path)

    def __enter__(self) -> Reached:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass


def test_a_way_that_is_closed(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    file = tmp_path / "closed/a.iso"
    file.touch()
    access.require_passable([str(file)], [str(file).split("/")[1]], WHO)  # it is shown by itself there
    with pytest.raises(errors.HostError, match=f"may not pass {tmp_path}/closed to .*a.iso") as caught:
        access.require_passable([str(file)], [], WHO)
    assert caught.value.hint == f"chmod o+x {tmp_path}/closed"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EPERM])
@pytest.mark.parametrize("listed", [True, False])
def test_a_file_whose_owner_cannot_be_changed(number: int, *, listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("virtd.drivers.qemu.acl.grant", refuse)
    monkeypatch.setattr(ownership, "_chown", refuse)
    path = os.path.realpath(os.__file__)  # one of root's
    status = os.stat(path)
    monkeypatch.setattr(ownership, "reached", lambda path: Open(path))
    given = Given(path, status.st_dev, status.st_ino, 0, 0, WHO.uid, listed=listed)
    with pytest.raises(errors.HostError, match=os.strerror(number)) as caught:
        ownership.hand_over([given], WHO)
    assert f"chmod o+r{'' if listed else 'w'} " in str(caught.value.hint)
    assert f"cp {path} /var/lib/virtd/images/" in str(caught.value.hint)


class Open(Reached):
    @property
    def identity(self) -> tuple[int, int]:
        return self.status.st_dev, self.status.st_ino


def test_a_dnsmasq_where_its_sandbox_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "dnsmasq"
    binary.touch(mode=0o755)
    monkeypatch.setattr(networks, "HIDDEN", (f"/{str(tmp_path).split('/')[1]}",))
    with pytest.raises(errors.HostError, match="its sandbox hides that directory") as caught:
        networks.dnsmasq(Dnsmasq(binary=str(binary)))
    assert "/usr/local/sbin" in str(caught.value.hint)
    monkeypatch.setattr(networks, "HIDDEN", ())
    assert networks.dnsmasq(Dnsmasq(binary=str(binary))) == str(binary)


def test_what_is_hidden_is_what_dnsmasqs_unit_hides() -> None:
    from virtd.drivers.network import dnsmasq

    files = dnsmasq.Files(*("/x" for _ in dnsmasq.Files._fields))
    found = {name: value for name, _, value in dnsmasq._sandbox(files)}
    inaccessible = {path.removeprefix("-") for path in found["InaccessiblePaths"] if path.count("/") == 1}
    assert inaccessible | {"/home"} == set(networks.HIDDEN)
