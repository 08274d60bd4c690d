# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's command line and the unit around it, read back and compared by meaning."""

from __future__ import annotations

import grp
import json
import os
import stat
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from virtd import errors
from virtd.drivers.qemu import command, nics, prerequisites, sandbox
from virtd.drivers.qemu.devices import assembly
from virtd.model import domain as model

if TYPE_CHECKING:
    from pathlib import Path

UUID = "0123abcd-4567-89ab-cdef-0123456789ab"
RUNTIME = "/run/virtd/qemu/web1"
HOST = command.HostFacts("/usr/bin/qemu-system-x86_64", kvm=True, runtime=RUNTIME)


def parse(text: str) -> model.Domain:
    return model.parse(f'name = "web1"\nmemory = "256M"\n{text}', "x")


KERNEL = parse('[boot]\nkernel = "/k,ernel"\ninitrd = "/i"\ncmdline = "console=ttyS0,115200 quiet"')
DISKS = parse(
    """
    vcpus = 3
    disk = [{ path = "/a,b/c=d.qcow2", format = "qcow2" }, { path = "/ro.img", readonly = true }]
    cdrom = [{ path = "/c,d.iso" }]
    nic = [{}, { mac = "52:54:00:AA:BB:CC" }]
    vnc = {}
    """
)


def options(domain: model.Domain, host: command.HostFacts = HOST) -> list[tuple[str, str]]:
    """The command line as (option, value) pairs."""
    arguments = command.argv(domain, UUID, host)
    assert arguments[0] == host.binary
    found, rest = [], arguments[1:]
    while rest:
        option = rest.pop(0)
        assert option.startswith("-")
        found.append((option, rest.pop(0) if rest and not rest[0].startswith("-") else ""))
    return found


def values(domain: model.Domain, option: str, host: command.HostFacts = HOST) -> list[str]:
    return [value for name, value in options(domain, host) if name == option]


def fields(value: str) -> dict[str, str]:
    """One QemuOpts list; what has no "=" is under its own name."""
    parts = value.replace(",,", "\0").split(",")
    return {key: text for key, _, text in (part.replace("\0", ",").partition("=") for part in parts)}


def test_who_it_is() -> None:
    assert fields(values(KERNEL, "-name")[0])["guest"] == "web1"
    assert values(KERNEL, "-uuid") == [UUID]
    assert fields(values(KERNEL, "-m")[0]) == {"size": f"{256 << 10}k"}
    assert values(DISKS, "-smp") == ["3"]


@pytest.mark.parametrize(("kvm", "accel", "cpu"), [(True, "kvm", "host"), (False, "tcg", "max")])
def test_with_and_without_kvm(kvm: bool, accel: str, cpu: str) -> None:
    host = command.HostFacts(HOST.binary, kvm, RUNTIME)
    assert fields(values(KERNEL, "-machine", host)[0])["accel"] == accel
    assert values(KERNEL, "-cpu", host) == [cpu]
    assert values(parse('cpu = "qemu64,-svm"\ncdrom = [{ path = "/c" }]'), "-cpu", host) == ["qemu64,-svm"]


def test_nothing_comes_of_itself() -> None:
    names = [option for option, _ in options(KERNEL)]
    assert {"-nodefaults", "-no-user-config"} <= set(names)
    assert values(KERNEL, "-display") == ["none"]
    assert "-netdev" not in names
    assert "-vnc" not in names
    assert "-blockdev" not in names


def test_the_sandbox_is_on() -> None:
    found = fields(values(KERNEL, "-sandbox")[0])
    assert "on" in found
    assert {found[key] for key in ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")} == {"deny"}


def test_two_monitors_and_a_console() -> None:
    chardevs = {fields(value)["id"]: fields(value) for value in values(DISKS, "-chardev")}
    assert chardevs["monitor"]["path"] == f"{RUNTIME}/qmp.sock"
    assert chardevs["shutdown"]["path"] == f"{RUNTIME}/shutdown.sock"
    for name in ("monitor", "shutdown"):
        assert "socket" in chardevs[name]
        assert (chardevs[name]["server"], chardevs[name]["wait"]) == ("on", "off")
    # ^C typed on the console is the guest's.
    assert chardevs["serial0"]["signal"] == "off"
    monitors = [fields(value) for value in values(DISKS, "-mon")]
    assert [(monitor["chardev"], monitor["mode"]) for monitor in monitors] == [
        ("monitor", "control"), ("shutdown", "control"),
    ]  # fmt: skip
    # No third one that writes every event somewhere: what ends it is a line on stderr.
    assert values(DISKS, "-trace") == ["qemu_system_shutdown_request*", "qemu_system_powerdown_request*"]
    assert values(DISKS, "-serial") == ["chardev:serial0"]


def test_a_comma_in_a_path_is_a_comma() -> None:
    host = command.HostFacts("/q", kvm=True, runtime="/run/a,id=x")
    assert fields(values(KERNEL, "-chardev", host)[0])["path"] == "/run/a,id=x/qmp.sock"
    nodes = {node["node-name"]: node for node in map(json.loads, values(DISKS, "-blockdev"))}
    assert nodes["file0"]["filename"] == "/a,b/c=d.qcow2"
    assert nodes["cdfile0"]["filename"] == "/c,d.iso"
    # -kernel, -initrd and -append are no lists: nothing is doubled there.
    assert values(KERNEL, "-kernel") == ["/k,ernel"]
    assert values(KERNEL, "-append") == ["console=ttyS0,115200 quiet"]
    assert values(KERNEL, "-initrd") == ["/i"]


def test_disks() -> None:
    nodes = {node["node-name"]: node for node in map(json.loads, values(DISKS, "-blockdev"))}
    assert (nodes["disk0"]["driver"], nodes["disk0"]["file"], nodes["disk0"]["read-only"]) == (
        "qcow2",
        "file0",
        False,
    )
    assert nodes["disk0"]["backing"] is None
    assert (nodes["disk1"]["driver"], nodes["disk1"]["file"], nodes["disk1"]["read-only"]) == ("raw", "file1", True)
    assert nodes["file1"]["read-only"] == nodes["cd0"]["read-only"] == nodes["cdfile0"]["read-only"] is True
    # QEMU's own locks are a second guard against two writers.
    assert nodes["file0"]["locking"] == "auto"
    devices = {device["id"]: device for value in values(DISKS, "-device") if "id" in (device := fields(value))}
    assert "virtio-blk-pci" in devices["virtio-disk0"]
    assert [devices[name]["drive"] for name in ("virtio-disk0", "virtio-disk1", "cdrom0")] == [
        "disk0",
        "disk1",
        "cd0",
    ]
    order = [int(devices[name]["bootindex"]) for name in ("virtio-disk0", "virtio-disk1", "cdrom0")]
    assert order == sorted(set(order))


def test_with_a_kernel_nothing_else_is_booted() -> None:
    domain = parse('boot = { kernel = "/k" }\ndisk = [{ path = "/a" }]\ncdrom = [{ path = "/c" }]')
    assert not [value for value in values(domain, "-device") if "bootindex" in value]


def test_networks() -> None:
    assert [fields(value)["id"] for value in values(DISKS, "-netdev")] == ["net0", "net1"]
    cards = [fields(value) for value in values(DISKS, "-device") if value.startswith("virtio-net")]
    assert [card["netdev"] for card in cards] == ["net0", "net1"]
    assert cards[0]["mac"] == assembly.mac_of(UUID, 0) == "52:54:00:67:89:ab"
    assert cards[1]["mac"] == "52:54:00:aa:bb:cc"


def test_made_up_macs_are_stable_distinct_and_never_overflow() -> None:
    macs = [assembly.mac_of("0" * 26 + "ffffff", index) for index in range(3)]
    assert macs == ["52:54:00:ff:ff:ff", "52:54:00:00:00:00", "52:54:00:00:00:01"]


@pytest.mark.parametrize(
    ("text", "panic", "shutdown", "reboot"),
    [
        ("", "exit-failure", "poweroff", "reset"),
        ('on_crash = "keep"', "pause", "poweroff", "reset"),
        ('on_crash = "restart"', "exit-failure", "poweroff", "reset"),
        ('on_poweroff = "keep"', "exit-failure", "pause", "reset"),
        ('on_reboot = "stop"', "exit-failure", "poweroff", "shutdown"),
    ],
)
def test_what_is_done_when(text: str, panic: str, shutdown: str, reboot: str) -> None:
    domain = parse(f'{text}\nboot = {{ kernel = "/k" }}')
    assert fields(values(domain, "-action")[0]) == {"panic": panic, "shutdown": shutdown, "reboot": reboot}


def test_small_things() -> None:
    assert "pvpanic" in values(KERNEL, "-device")
    assert "virtio-rng-pci,rng=rng0,bus=pcie.0,addr=0x1" in values(KERNEL, "-device")
    bare = parse('rng = false\nmachine = "microvm"\nboot = { kernel = "/k" }')
    assert values(bare, "-device") == []
    assert fields(values(DISKS, "-vnc")[0]) == {f"unix:{RUNTIME}/vnc.sock": ""}
    assert values(parse('boot = { kernel = "/k" }\nvnc = { enabled = false }'), "-vnc") == []


# The unit


def properties(domain: model.Domain, *, kvm: bool = True, tap: bool = False, vhost: bool = False) -> dict[str, Any]:
    toplevel = ["bin", "boot", "dev", "etc", "home", "proc", "root", "run", "srv", "sys", "tmp", "usr", "var"]
    devices = prerequisites.devices(kvm=kvm, tap=tap, vhost=vhost)
    found = sandbox.properties(domain, RUNTIME, toplevel=toplevel, devices=devices, stop_after=60)
    names = [name for name, _, _ in found]
    assert {name for name in names if names.count(name) > 1} == {"SystemCallFilter"}  # what is allowed, less some
    return {name: value for name, _, value in found}


def bound(value: list[tuple[str, str, bool, int]]) -> dict[str, bool]:
    """Bind mounts: source, and whether it may be missing."""
    assert all(source == target for source, target, _, _ in value)
    return {source: missing_ok for source, _, missing_ok, _ in value}


def test_a_guest_sees_its_own_files_only() -> None:
    found = properties(DISKS)
    hidden = {path for path, _ in found["TemporaryFileSystem"]}
    assert {"/etc", "/home", "/root", "/run", "/tmp", "/var", "/srv", "/boot"} <= hidden
    assert not hidden & {"/usr", "/proc", "/sys", "/dev", "/bin"}
    writable, readable = bound(found["BindPaths"]), bound(found["BindReadOnlyPaths"])
    assert set(writable) == {RUNTIME, "/a,b/c=d.qcow2"}
    assert {"/ro.img", "/c,d.iso"} <= set(readable)
    # A disk that is gone by then must not keep the unit's ExecStop from asking the guest to shut down.
    assert writable == {RUNTIME: False, "/a,b/c=d.qcow2": True}
    assert all(readable.values())
    assert "/etc/resolv.conf" in readable
    assert not {path for path in readable if path.startswith("/etc")} & {"/etc/shadow", "/etc/passwd", "/etc/virtd"}


def test_a_qemu_of_somebodys_own_is_shown() -> None:
    found = sandbox.properties(KERNEL, RUNTIME, toplevel=["opt"], program=["/opt/q"], devices=[], stop_after=60)
    shown = bound({name: value for name, _, value in found}["BindReadOnlyPaths"])
    assert "/opt/q" in shown


def test_a_drive_without_a_medium() -> None:
    empty = parse('boot = { kernel = "/k" }\ncdrom = [{}, { path = "/a.iso" }]')
    drives = [fields(value) for value in values(empty, "-device") if value.startswith("ide-cd")]
    assert [(drive["id"], drive.get("drive")) for drive in drives] == [("cdrom0", None), ("cdrom1", "cd1")]
    assert "/a.iso" in bound(properties(empty)["BindReadOnlyPaths"])
    assert model.paths(empty)[-1] == ("cdrom[1].path", "/a.iso")
    with pytest.raises(errors.InvalidDefinition, match=r"cdrom\[0\].path: expected a path: with microvm"):
        parse('machine = "microvm"\nboot = { kernel = "/k" }\ncdrom = [{}]')
    with pytest.raises(errors.InvalidDefinition, match="to boot from"):
        parse("cdrom = [{}]")


def test_a_guest_without_a_network_has_none() -> None:
    assert properties(KERNEL)["RestrictAddressFamilies"] == (True, ["AF_UNIX"])
    assert "/etc/resolv.conf" not in bound(properties(KERNEL)["BindReadOnlyPaths"])
    assert properties(DISKS)["RestrictAddressFamilies"] == (True, ["AF_UNIX", "AF_INET", "AF_INET6"])


def test_a_guest_has_no_privileges() -> None:
    found = properties(KERNEL)
    assert found["CapabilityBoundingSet"] == 0
    assert found["RestrictNamespaces"] == 0x02000000, "control groups, for systemd writes none down as all"
    for name in (
        "NoNewPrivileges", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs",
        "ProtectControlGroups", "ProtectClock", "RestrictSUIDSGID", "RestrictRealtime", "LockPersonality",
    ):  # fmt: skip
        assert found[name] is True, name
    assert found["LimitCORE"] == 0


def test_devices() -> None:
    assert properties(KERNEL, kvm=True)["DeviceAllow"] == [("/dev/kvm", "rw")]
    assert properties(KERNEL, kvm=True)["DevicePolicy"] == "closed"
    assert properties(KERNEL, kvm=False)["PrivateDevices"] is True
    assert "DeviceAllow" not in properties(KERNEL, kvm=False)
    found = properties(KERNEL, kvm=False, tap=True, vhost=True)
    assert found["DeviceAllow"] == [("/dev/net/tun", "rw"), ("/dev/vhost-net", "rw")]


def test_vhost_where_the_guests_may_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "vhost-net"
    monkeypatch.setattr(prerequisites, "VHOST", str(device))
    mine = prerequisites.Account("me", "me", os.getuid(), os.getgid(), ())
    other = prerequisites.Account("other", "other", os.getuid() + 1, os.getgid() + 1, ())
    in_group = msgspec.structs.replace(other, groups=(grp.getgrgid(os.getgid()).gr_name,))
    assert not prerequisites.has_vhost(mine)
    device.touch()
    for mode, able in ((0o600, [mine]), (0o660, [mine, in_group]), (0o666, [mine, in_group, other])):
        device.chmod(mode)
        assert [who for who in (mine, in_group, other) if prerequisites.has_vhost(who)] == able


def test_cards_in_networks() -> None:
    domain = parse('boot = { kernel = "/k" }\nnic = [{}, { network = "lab" }]')
    host = command.HostFacts("/q", True, RUNTIME, {1: "vt-web1-1"}, True)
    arguments = command.argv(domain, UUID, host)
    assert values(domain, "-netdev")[0] == "user,id=net0"
    assert "tap,ifname=vt-web1-1,script=no,downscript=no,vhost=on,id=net1" in arguments
    # Through a tap it speaks to nobody but the kernel.
    only = parse('boot = { kernel = "/k" }\nnic = [{ network = "lab" }]')
    found = properties(only, tap=True)
    assert found["RestrictAddressFamilies"] == (True, ["AF_UNIX"])
    # Its unit names no network's: that one could be stopped then, and not started again as long as the guest runs.
    assert "After" not in found


def test_names_of_taps() -> None:
    names = {nics.interface_name(name, 0) for name in ("web1", "a" * 10, "a" * 11, "a" * 64, "b" * 64)}
    assert len(names) == 5
    assert max(map(len, names)) <= 15
    assert "vt-web1-0" in names


def test_host_shutdown_asks_the_guest_first() -> None:
    found = properties(KERNEL)
    ((program, arguments, ignore_failure),) = found["ExecStop"]
    assert program == arguments[0] == "/bin/sh"
    assert ignore_failure is False
    assert f"{RUNTIME}/shutdown.sock 60" in arguments[2]
    # What systemd 252 can't read back from a transient unit's file.
    assert not set("$;'\"\\") & set(arguments[2])
    # systemd has patience for longer than the helper.
    assert found["TimeoutStopUSec"] == 70_000_000


def test_a_file_in_dev_shm_is_no_device() -> None:
    """In /dev there are block devices, but in /dev/shm files in memory."""
    domain = parse('disk = [{ path = "/dev/shm/a.raw", format = "raw" }, { path = "/dev/vg0/b", format = "raw" }]')
    words = command.argv(domain, UUID, HOST)
    found = [json.loads(words[at + 1]) for at, word in enumerate(words) if word == "-blockdev"]
    drivers = {node["filename"]: node["driver"] for node in found if "filename" in node}
    assert drivers == {"/dev/shm/a.raw": "file", "/dev/vg0/b": "host_device"}
    assert properties(domain, kvm=False)["DeviceAllow"] == [("/dev/vg0/b", "rw")]


def test_a_link_to_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is named by its path in /dev, by which QEMU and its unit know that it is one: the error has it."""
    link = tmp_path / "link"
    link.symlink_to("/dev/vg0/b")
    status = os.stat_result((stat.S_IFBLK | 0o600, *[0] * 9))
    monkeypatch.setattr("virtd.reach.defined", lambda *_of: status)
    who = prerequisites.Account("me", "me", os.getuid(), os.getgid(), ())
    with pytest.raises(errors.InvalidDefinition, match="expected a regular file") as caught:
        prerequisites.check_files(parse(f'disk = [{{ path = "{link}" }}]'), "web1.toml", who)
    assert "/dev/vg0/b" in str(caught.value.hint)
    prerequisites.check_files(parse('disk = [{ path = "/dev/vg0/b" }]'), "web1.toml", who)
