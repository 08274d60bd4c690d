# SPDX-License-Identifier: LGPL-2.1-or-later
"""What units are given is the same to systemd after it has read it again from a file."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from virtd import errors
from virtd.drivers.lxc import config
from virtd.drivers.lxc import sandbox as lxc
from virtd.drivers.network import dnsmasq
from virtd.drivers.qemu import images
from virtd.drivers.qemu import sandbox as qemu
from virtd.drivers.qemu.devices import assembly
from virtd.drivers.storage import sandbox as storage
from virtd.model import container, domain, drives
from virtd.systemd import aliases
from virtd.systemd.transient import UnitSpec, transient_properties

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from virtd.systemd.aliases import Property

D = "/run/virtd/paths/qemu.web1"
ODD = (
    "/srv/my docs", "/srv/it's", '/srv/a "b"', "/srv/back\\slash\\", "/srv/a:b", "/srv/100%", "/srv/$HOME",
    "/srv/a;b", "/srv/new\nline", "/srv/tab\t", "/srv/\x01", "/srv/ü", "/srv/#1", "/srv/*", "/ leading",
)  # fmt: skip


def paths_of(properties: list[Property]) -> list[str]:
    """All that is a path in them."""
    found: list[str] = []
    for key, _signature, value in properties:
        match key:
            case "BindPaths" | "BindReadOnlyPaths":
                found += [path for source, target, *_rest in value for path in (source, target)]
            case "TemporaryFileSystem":
                found += [path for path, _options in value]
            case "ReadWritePaths" | "ReadOnlyPaths" | "InaccessiblePaths":
                found += [path.lstrip("-+") for path in value]
            case _:
                pass
    return found


def read_again(text: str) -> list[str]:
    """The words of a line in a unit's file: as extract_first_word() has them, with separators of BindPaths= and
    without what quotes, escapes, specifiers and variables do. Who has none of those is read as it was written.
    """
    if re.search(r"[\\'\"%$\n\x00-\x1f\x7f-\uffff]", text):
        return [f"something other than {text}"]
    return re.split(r"[ \t:]", text)


def everything() -> Iterator[list[Property]]:
    """The properties of every kind of unit, with odd paths wherever a user may name one."""
    toplevel = ["etc", "run", "srv", "usr", "my top", "co:lon"]
    guest = domain.Domain(
        name="g",
        memory="1G",
        boot=domain.Boot(kernel=ODD[0], initrd=ODD[1]),
        disk=tuple(drives.Disk(path=path) for path in ODD[2:]),
        cdrom=(drives.Cdrom(path="/srv/c d.iso"),),
    )
    backed = [images.Image("/srv/v 1", drives.Format.QCOW2, backing=(("/srv/below'", drives.Format.RAW),))]
    device = [images.Image("/dev/disk/by-path/pci-0000:00:1f.2", after="srv-my\\x20docs.mount")]
    for disks in (None, backed, device):
        one = guest if disks is None else msgspec.structs.replace(guest, disk=guest.disk[:1])
        has = assembly.assemble(one, "", disks=disks)
        yield qemu.properties(guest, "/run/virtd/qemu/g", toplevel=toplevel, devices=[], stop_after=60, has=has)
    host = config.HostFacts("/run/virtd/lxc/c", "/run/virtd/lxc/c", ODD[0], None, False, "", "", "", False, "")
    box = container.Container(
        name="c",
        rootfs=ODD[0],
        mount=tuple(container.Mount(source=path, target="/x") for path in ODD[1:]),
    )
    yield lxc.properties(box, host, container.Limits(), toplevel=toplevel, stop_after=60)
    yield lxc.entering("/run/virtd/lxc/c", privileged=False, toplevel=toplevel)
    yield lxc.making(ODD[0], ODD[1], toplevel=toplevel)
    yield storage.properties(ODD[:5], ODD[5:], toplevel=toplevel, devices=["/dev/sda"])
    yield storage.privileged()
    yield list(dnsmasq._sandbox(dnsmasq.files_in("/run/virtd/network/n", "/var/lib/virtd/network/n")))


@pytest.mark.parametrize("properties", [*everything()])
def test_every_kind_of_unit(properties: list[Property]) -> None:
    spec = UnitSpec("u.service", "A unit", "virtd.slice", ("/x", *ODD), properties=tuple(properties))
    wanted = transient_properties(spec, (os.devnull, os.devnull, os.devnull), 257)
    found, odd = aliases.harmless(wanted, D)
    for path in paths_of(found):
        assert read_again(path) == [path]
    # What each name stands for is what was wanted, and in its order.
    real = {f"{D}/{number}": path for number, path in enumerate(odd)} | ({D: ""} if odd else {})
    assert [path for one in paths_of(found) if (path := real.get(one, one))] == paths_of(wanted)
    assert len(odd) == len(set(odd))
    # systemd writes "none" down as nothing, which is "any" when it is read again.
    assert ("RestrictNamespaces", "t", 0) not in found


def test_plain_paths_are_left_alone() -> None:
    properties: list[Property] = [
        ("BindPaths", "a(ssbt)", [("/srv/a,b=c@1.qcow2", "/srv/a,b=c@1.qcow2", True, 0)]),
        ("ReadWritePaths", "as", ["-/var/lib/x_y+z"]),
    ]
    assert aliases.harmless(properties, "") == (properties, [])


def test_prefixes_are_kept() -> None:
    (first, bind), odd = aliases.harmless([("InaccessiblePaths", "as", ["-/a b", "+/a b", "/c"])], D)
    assert first == ("InaccessiblePaths", "as", [f"-{D}/0", f"+{D}/0", "/c"])
    assert (bind, odd) == (("BindReadOnlyPaths", "a(ssbt)", [(D, D, True, 0)]), ["/a b"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Description", "100% of it"),
        ("ExecStop", [("/bin/sh", ["/bin/sh", "-c", "echo $HOME"], False)]),
        ("Environment", ["A=b\\"]),
        ("DeviceAllow", [("/dev/it's", "rw")]),
        ("After", ["a b.mount"]),
        ("StandardInputFile", "/run/a\nb"),
    ],
)
def test_other_odd_text_is_refused(key: str, value: Any) -> None:
    with pytest.raises(errors.HostError, match=key):
        aliases.harmless([(key, "s", value)], D)


def test_odd_paths_need_a_place_for_their_names() -> None:
    with pytest.raises(errors.HostError, match="/a b"):
        aliases.harmless([("ReadWritePaths", "as", ["/a b"])], "")


def test_what_runs_already_may_be_anything() -> None:
    start = ("ExecStart", "a(sasb)", [("/bin/sh", ["sh", "-c", "'$1' % \\ ;"], False)])
    assert aliases.harmless([start], D) == ([start], [])


def test_links(tmp_path: Path) -> None:
    directory = str(tmp_path / "paths" / "qemu.web1")
    for _ in range(2):
        aliases.make(directory, list(ODD))
        assert [os.readlink(f"{directory}/{number}") for number in range(len(ODD))] == list(ODD)
        assert os.stat(directory).st_mode & 0o7777 == 0o700
    aliases.remove(directory)
    aliases.remove(directory)
    assert os.listdir(tmp_path / "paths") == []


def test_links_that_cannot_be_made(tmp_path: Path) -> None:
    directory = str(tmp_path / "paths" / "qemu.web1")
    with pytest.raises(errors.HostError, match="File name too long"):
        aliases.make(directory, ["/a b", "/" + "x" * 5000])
    assert not os.path.lexists(directory)
