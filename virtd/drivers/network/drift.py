# SPDX-License-Identifier: LGPL-2.1-or-later
"""Differences from what virtd made, and the checks that bridges and ports share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from . import links, prerequisites

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...hints import Hint
    from .kernel import Address, Kernel, Link
    from .ports import Ground
    from .routes import Route

MTU = 1500  # for a network whose definition doesn't set it


class Drift(NamedTuple):
    """One thing that isn't as virtd made it.

    `key` identifies the thing, `text` says what differs: "vt-web1-0: in no bridge". `mend` restores it; None if a
    person has to, for whom `hint` explains how. Not `vital`: guests can do without it. `new`: nobody changed anything
    (a container's reboot recreated its interface, say), so it is restored however often it occurs. `quiet`: an older
    virtd may have left it so. `gone`: it may be about to leave the record. `stray`: the name of an interface to be
    refused, and then put out of the bridge.
    """

    key: str
    text: str
    mend: Callable[[Kernel], None] | None = None
    hint: Hint = ""
    vital: bool = True
    new: bool = False
    quiet: bool = False
    gone: bool = False
    stray: str = ""


class Seen(NamedTuple):
    """What the kernel reports of the interfaces that were looked at."""

    links: dict[str, Link]
    addresses: dict[str, set[Address]]
    neighbours: set[tuple[str, str]]
    routes: list[Route]


def setting(link: Link, key: str, value: int, *, vital: bool = True, new: bool = False) -> Iterator[Drift]:
    """The difference, if any, of a sysctl of an interface."""
    found = link.values.get(key)
    if found is None or found == value:
        return
    family, _, what = key.partition("/")
    path = f"net/{family}/conf/{link.name}/{what}"

    def mend(_kernel: Kernel) -> None:
        prerequisites.set_sysctl(path, str(value))

    text = f"{prerequisites.dotted(path)}: {found} instead of {value}"
    hint = "Where /proc/sys is writable, sysctl -w NAME=VALUE sets it."
    yield Drift(f"{link.name} {key}", text, mend, hint, vital=vital, new=new)


def strangers(name: str, addresses: set[Address], *, new: bool = False) -> Iterator[Drift]:
    for one in sorted(addresses):
        yield Drift(
            f"{name} {one.address}", f"{name}: an address that isn't virtd's, {one.address}/{one.prefix}",
            partial(_delete, name, one), new=new,
        )  # fmt: skip


def _delete(name: str, one: Address, kernel: Kernel) -> None:
    kernel.delete_address(name, *one)


def is_link_local(one: Address) -> bool:
    return one.address.startswith("fe80:")


def mtu_of(ground: Ground) -> int | None:
    """The MTU of the bridge and its ports; None if it follows an interface that somebody else added."""
    network = ground.network
    if network.mtu is not None or not network.own:
        return network.mtu
    ours = {port.interface for port in ground.ports}
    others = [name for name in links.members(network.bridge_name) if name not in ours]
    return MTU if all(links.mtu(name) >= MTU for name in others) else None
