# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the QEMU driver needs of the host: the program, KVM, the guests' users, and the files of a guest."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import stat
from typing import TYPE_CHECKING

import msgspec

from ... import errors, reach
from ...children import programs
from ...hints import do
from ...model import domain as model
from ...model import size
from ...model.document import shown
from ...model.drives import Format
from ...text import word
from ..nodes import is_device

if TYPE_CHECKING:
    from ...children.facts import Facts
    from ...model.settings import Qemu

KVM, VHOST, TUN = "/dev/kvm", "/dev/vhost-net", "/dev/net/tun"
# uname's names and QEMU's differ for some (docs/system/targets).
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64", "i686": "i386"}


class Account(msgspec.Struct, frozen=True):
    """The user that a guest runs as. `own`: for this guest only, and with a name only while it is needed."""

    user: str
    group: str
    uid: int
    gid: int
    groups: tuple[str, ...]  # more groups: those that may open KVM, VHOST and TUN
    own: bool = False

    @property
    def in_unit(self) -> tuple[str, str]:
        """User and group for a unit: by number if they are the guest's own, so that a name can't come to mean
        another user."""
        return (str(self.uid), str(self.gid)) if self.own else (self.user, self.group)


def own(name: str, uid: int) -> Account:
    """A user and group of a guest's own."""
    return Account(name, name, uid, uid, _device_groups(uid), own=True)


def account(settings: Qemu, facts: Facts) -> Account:
    """The one user of all guests, if virtd.toml says so; older versions of virtd always had it so.

    Raises HostError when there is no such user or group, or it is root.
    """
    hint = "Run systemd-sysusers, or set qemu.user and qemu.group in virtd.toml to unprivileged ones."
    uid, gid = facts.ids(settings.shared_user, settings.shared_group, "guests", hint)
    return Account(settings.shared_user, settings.shared_group, uid, gid, _device_groups(gid))


def group_of(settings: Qemu) -> int:
    """The group of jobs on volumes, which may read them; root's if there is none."""
    try:
        return grp.getgrnam(settings.shared_group).gr_gid
    except KeyError:
        return 0


def _device_groups(gid: int) -> tuple[str, ...]:
    """The groups that may open KVM, VHOST and TUN, besides `gid` and root's."""
    groups: list[str] = []
    for device in (KVM, VHOST, TUN):
        with contextlib.suppress(OSError, KeyError):
            owner = os.stat(device).st_gid
            if owner not in (0, gid) and (name := grp.getgrgid(owner).gr_name) not in groups:
                groups.append(name)
    return tuple(groups)


def binary(settings: Qemu) -> str:
    """The QEMU to run. Raises HostError when it is missing or not executable."""
    if settings.binary:
        candidates = [settings.binary]
    else:
        machine = os.uname().machine
        name = f"qemu-system-{ARCHITECTURES.get(machine, machine)}"
        candidates = [f"{place}/{name}" for place in programs.PLACES] + ["/usr/libexec/qemu-kvm"]
    for candidate in candidates:
        if os.path.isfile(candidate):
            if os.access(candidate, os.X_OK):
                return candidate
            raise errors.HostError(f"{candidate} is not executable", hint="See qemu.binary in virtd.toml.")
    raise errors.HostError(
        f"QEMU is missing: no {candidates[0]}",
        hint="Install qemu-system (Fedora: qemu-kvm), or set qemu.binary in virtd.toml.",
    )


def has_vhost(who: Account) -> bool:
    """Whether the kernel handles a guest's packets itself: the device can be opened, also by the guest's user.

    QEMU refuses to start with an option for a device that it can't open.
    """
    try:
        os.close(os.open(VHOST, os.O_RDWR | os.O_CLOEXEC))  # which has the kernel load its module
        return may_use(os.stat(VHOST), who)
    except OSError:
        return False


def may_use(status: os.stat_result, who: Account) -> bool:
    """Whether the guest's user may open a device, by its mode."""
    groups = {who.gid}
    for name in who.groups:
        with contextlib.suppress(KeyError):
            groups.add(grp.getgrnam(name).gr_gid)
    wanted = 0o600 if status.st_uid == who.uid else 0o060 if status.st_gid in groups else 0o006
    return status.st_mode & wanted == wanted


def devices(*, kvm: bool, tap: bool, vhost: bool) -> list[str]:
    """What QEMU opens in /dev, besides what everybody may."""
    wanted = ((KVM, kvm), (TUN, tap), (VHOST, vhost))
    return [path for path, needed in wanted if needed]


def missing_files(domain: model.Domain) -> list[tuple[str, str]]:
    """Files that the definition names and that don't exist, or can't be given to a guest, as (key, text)."""
    found = []
    for key, path in model.paths(domain):
        text = reach.trouble(path)
        if not text:
            with contextlib.suppress(OSError, errors.HostError):
                text, _ = _wrong_kind(key, path, reach.look(path).st_mode)
        if text:
            found.append((key, text))
    return found


def _wrong_kind(key: str, path: str, mode: int) -> tuple[str, str]:
    """What is wrong with what is neither a file nor, for a disk, a block device; and a hint."""
    device = key.startswith("disk") and stat.S_ISBLK(mode)
    if stat.S_ISREG(mode) or (device and is_device(path)):
        return "", ""
    hint = f"Name the device by its path in /dev: {os.path.realpath(path)}, say." if device else ""
    return f"expected a regular file: {path}", hint


def check_files(domain: model.Domain, source: str, who: Account) -> None:
    """Check that each file exists, is of the right kind, and can be used. Raises InvalidDefinition or Busy."""
    read_only = {f"disk[{index}].path" for index, disk in enumerate(domain.disk) if disk.readonly}
    images = {f"disk[{index}].path" for index, disk in enumerate(domain.disk) if disk.format is Format.QCOW2}
    for key, path in model.paths(domain):
        status = reach.defined(path, source, key)
        wrong, hint = _wrong_kind(key, path, status.st_mode)
        if wrong:
            raise errors.InvalidDefinition(source, key, wrong, hint=hint)
        written = key.startswith("disk") and key not in read_only
        if written and stat.S_ISREG(status.st_mode) and _read_only(path):
            raise errors.InvalidDefinition(
                source,
                key,
                f"the guest writes to it, and its file system is mounted read-only: {path}",
                hint="Set readonly = true for it, mount the file system writable, or use a copy.",
            )
        if stat.S_ISBLK(status.st_mode) and key not in read_only and claimed(path):
            raise errors.Busy(
                f"{source}: {key}: {path} is in use by the host, which has it mounted or in a volume group",
                hint="Unmount it first, or have the guest only read it: readonly = true.",
            )
        if key in images:
            _check_qcow2(key, path, source)
        # A user of its own is granted access to what it may not read.
        if key.startswith("boot") and not who.own and not may(status, who, os.R_OK):
            raise errors.InvalidDefinition(
                source, key, f"{path} is not readable for {who.user}", hint=f"chmod o+r {word(path)}, or use a copy."
            )
    if domain.memory_bytes > (total := memory_total()):
        raise errors.InvalidDefinition(
            source,
            "memory",
            f"expected at most what the host has, {size.show(total >> 20 << 20)}, got {domain.memory}",
        )


def _read_only(path: str) -> bool:
    """Whether the file system is mounted read-only there, on the host."""
    with reach.reached(path) as file:
        return bool(os.statvfs(file.itself).f_flag & os.ST_RDONLY)


def _check_qcow2(key: str, path: str, source: str) -> None:
    """Raise InvalidDefinition for an image that names other files: QEMU must not follow its header."""
    from .. import qcow2  # no start of the daemon needs it

    with reach.reached(path) as file:
        fd = os.open(file.itself, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        header = qcow2.read(fd, path)
    except errors.InvalidState:
        return  # QEMU will say what is wrong with it
    finally:
        os.close(fd)
    if wrong := qcow2.unusable(header):
        raise errors.InvalidDefinition(source, key, f"{path} can't be used: {wrong}")
    if header.backing:
        raise errors.InvalidDefinition(
            source,
            key,
            f"{path} has the backing file {shown(header.backing)}, which only a volume can",
            hint="Import both into a pool: "
            + do("import", "volume")
            + f"; or make one image of both: qemu-img convert -O qcow2 {word(path)} NEW.",
        )


def claimed(path: str) -> bool:
    """Whether the kernel uses a block device itself: O_EXCL is refused then, see open(2)."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as exc:
        return exc.errno == errno.EBUSY
    return False


def may(status: os.stat_result, who: Account, wanted: int) -> bool:
    """Whether the guest's user may open a file, by its mode."""
    shift = 6 if status.st_uid == who.uid else 3 if status.st_gid == who.gid else 0
    return (status.st_mode >> shift) & wanted == wanted


def memory_total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def identity(path: str) -> tuple[int, int] | None:
    """Device and inode of the file at a path, so that two names of one disk count as one."""
    try:
        status = reach.look(path, reach.Trust.ANYBODY)
    except OSError:
        return None
    return (status.st_dev, status.st_ino)
