# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the D-Bus interfaces of org.virtd1 consist of: one table, for the server and for Introspect alike.

Nothing is quoted in the XML: D-Bus names have no character that would have to be, and xml.sax.saxutils brings an HTTP
client along, 4 MB of the daemon's memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MANAGER: Final = "org.virtd1.Manager"
DOMAIN: Final = "org.virtd1.Domain"
NETWORK: Final = "org.virtd1.Network"
NETWORK_MANAGER: Final = "org.virtd1.NetworkManager"
POOL: Final = "org.virtd1.Pool"
POOL_MANAGER: Final = "org.virtd1.PoolManager"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
PEER: Final = "org.freedesktop.DBus.Peer"

DOCTYPE: Final = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)


class Args(msgspec.Struct, frozen=True):
    """Arguments: "name:signature" each, separated by spaces."""

    text: str = ""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for item in self.text.split():
            name, _, signature = item.partition(":")
            yield name, signature

    @property
    def signature(self) -> str:
        return "".join(item.partition(":")[2] for item in self.text.split())


class Method(msgspec.Struct, frozen=True):
    """A method; `reading` ones are for everybody, the others for root.

    `waiting` ones last until something happens. `shared` ones cost much, see virtd.api.interfaces.Method.
    """

    takes: Args = Args()
    gives: Args = Args()
    reading: bool = False
    waiting: bool = False
    shared: bool = False


class Property(msgspec.Struct, frozen=True):
    """A property, read-only as all of ours are; `emits` is its EmitsChangedSignal."""

    signature: str
    emits: str = "true"


class Interface(msgspec.Struct, frozen=True):
    """Methods, properties and signals by name."""

    methods: dict[str, Method] = {}
    properties: dict[str, Property] = {}
    signals: dict[str, Args] = {}


def _reading(takes: str = "", gives: str = "") -> Method:
    return Method(Args(takes), Args(gives), reading=True)


def _waiting(takes: str = "", gives: str = "") -> Method:
    return Method(Args(takes), Args(gives), reading=True, waiting=True)


def _shared(takes: str = "", gives: str = "") -> Method:
    return Method(Args(takes), Args(gives), reading=True, shared=True)


def _changing(takes: str = "", gives: str = "") -> Method:
    return Method(Args(takes), Args(gives))


# What every object has.
COMMON: Final = {
    "Name": Property("s", "const"),
    "Driver": Property("s", "const"),
    "Uuid": Property("s", "const"),
    "State": Property("s"),
    "Reason": Property("s"),
    "Since": Property("s"),
    "Autostart": Property("b"),
}
# What runs as a process in a unit of its own.
SUPERVISED: Final = COMMON | {
    "Unit": Property("s", "const"),
    "Pid": Property("u"),
    "Exit": Property("a{sv}", "invalidates"),
}

INTERFACES: Final[dict[str, Interface]] = {
    MANAGER: Interface(
        methods={
            "List": _reading("", "domains:a(sossus)"),  # name, path, uuid, state, pid, reason
            "Status": _shared("", "status:a{sv}"),
            "Define": _changing("text:s source:s check:b", "name:s uuid:s created:b file:s warnings:as"),
            "Check": _shared("", "differences:aa{sv} objects:u"),
            "Repair": _changing("", "differences:aa{sv} objects:u"),
            "Reload": _changing("", "changed:as problems:aa{sv}"),
        },
        properties={
            "Version": Property("s", "const"),
            "Domains": Property("u"),
            "Running": Property("u"),
        },
    ),
    DOMAIN: Interface(
        methods={
            "Info": _reading("", "info:a{sv}"),
            "Dump": _reading("", "text:s"),
            "Wait": _waiting("states:as timeout:d", "state:s"),
            "Start": _changing("", "changed:b"),
            "Shutdown": _changing("timeout:d", "changed:b"),
            "Stop": _changing("", "changed:b"),
            "Kill": _changing("signal:i"),
            "Reboot": _changing("force:b", "changed:b"),
            "Suspend": _changing("", "changed:b"),
            "Resume": _changing("", "changed:b"),
            "SetAutostart": _changing("enable:b", "changed:b"),
            "Undefine": _changing(),
        },
        properties=SUPERVISED
        | {
            "Id": Property("i"),
        },
        signals={"Ended": Args("exit:a{sv}")},
    ),
    NETWORK_MANAGER: Interface(
        methods={
            "Define": _changing("text:s source:s check:b", "name:s uuid:s created:b file:s warnings:as"),
            "DefineDefault": _changing("", "name:s uuid:s created:b file:s warnings:as"),
        }
    ),
    NETWORK: Interface(
        methods={
            "Info": _reading("", "info:a{sv}"),
            "Dump": _reading("", "text:s"),
            "Leases": _reading("", "leases:aa{sv}"),
            "Start": _changing("", "changed:b"),
            "Stop": _changing("force:b", "changed:b"),
            "SetAutostart": _changing("enable:b", "changed:b"),
            "Undefine": _changing(),
        },
        properties=COMMON
        | {
            "Pid": Property("u"),
            "Mode": Property("s"),
            "Bridge": Property("s"),
            "Addresses": Property("as"),
        },
    ),
    "org.virtd1.ContainerManager": Interface(
        methods={"Define": _changing("text:s source:s check:b", "name:s uuid:s created:b file:s warnings:as")}
    ),
    "org.virtd1.Container": Interface(
        methods={
            "Info": _reading("", "info:a{sv}"),
            "Dump": _reading("", "text:s"),
            "Wait": _waiting("states:as timeout:d", "state:s"),
            "Start": _changing("", "changed:b"),
            "Shutdown": _changing("timeout:d", "changed:b"),
            "Stop": _changing("", "changed:b"),
            "Kill": _changing("signal:i"),
            "Reboot": _changing("timeout:d", "changed:b"),
            "Freeze": _changing("", "changed:b"),
            "Thaw": _changing("", "changed:b"),
            "SetAutostart": _changing("enable:b", "changed:b"),
            "Undefine": _changing(),
        },
        properties=SUPERVISED
        | {
            "Addresses": Property("as", "invalidates"),
        },
        signals={"Ended": Args("exit:a{sv}")},
    ),
    POOL_MANAGER: Interface(
        methods={
            "Define": _changing("text:s source:s check:b", "name:s uuid:s created:b path:s warnings:as"),
            "ListJobs": _reading("", "jobs:aa{sv}"),
            "WaitJob": _waiting("job:s timeout:d", "job:a{sv}"),
            "CancelJob": _changing("job:s", "changed:b"),
            # Everything has been written to what UploadVolume gave: the job that goes on, "" when all is done.
            "Uploaded": _changing("job:s", "job:s"),
        },
    ),
    POOL: Interface(
        methods={
            "Info": _reading("", "info:a{sv}"),
            "Dump": _reading("", "text:s"),
            "ListVolumes": _shared("", "volumes:aa{sv}"),
            "VolumeInfo": _shared("volume:s", "info:a{sv}"),
            "ListSnapshots": _shared("volume:s", "snapshots:aa{sv}"),
            "Start": _changing("", "changed:b"),
            "Stop": _changing("", "changed:b"),
            "Refresh": _changing("", "volumes:x"),
            "SetAutostart": _changing("enable:b", "changed:b"),
            "Undefine": _changing(),
            # Each gives the job that goes on, "" when all is done.
            "CreateVolume": _changing("volume:s size:s format:s", "job:s"),
            "CloneVolume": _changing("volume:s to:s", "job:s"),
            # `from` is the image's format, which is never guessed; without a file, of what is there under that name.
            "ImportVolume": _changing("volume:s file:s from:s format:s", "job:s"),
            "ResizeVolume": _changing("volume:s size:s", "job:s"),
            "WipeVolume": _changing("volume:s", "job:s"),
            "DeleteVolume": _changing("volume:s", "job:s"),
            # `content` is to be written from `offset` on, more than 0 only with `resume`. Size 0: not known.
            "UploadVolume": _changing("volume:s format:s size:t resume:b", "job:s content:h offset:t"),
            "DownloadVolume": _changing("volume:s", "format:s content:h"),
        },
        properties=COMMON
        | {
            "Type": Property("s"),
            "Path": Property("s"),
            "Capacity": Property("t"),
            "Allocation": Property("t"),
            "Available": Property("t"),
        },
    ),
    INTROSPECTABLE: Interface(methods={"Introspect": _shared("", "xml:s")}),
    PROPERTIES: Interface(
        methods={
            "Get": _reading("interface:s property:s", "value:v"),
            "GetAll": _reading("interface:s", "properties:a{sv}"),
            "Set": _reading("interface:s property:s value:v"),
        },
        signals={"PropertiesChanged": Args("interface:s changed:a{sv} invalidated:as")},
    ),
    OBJECT_MANAGER: Interface(
        methods={"GetManagedObjects": _shared("", "objects:a{oa{sa{sv}}}")},
        signals={
            "InterfacesAdded": Args("object:o interfaces:a{sa{sv}}"),
            "InterfacesRemoved": Args("object:o interfaces:as"),
        },
    ),
    # GDBus answers its calls.
    PEER: Interface(methods={"Ping": _reading(), "GetMachineId": _reading("", "id:s")}),
}


def document(interfaces: Iterable[str], children: Iterable[str]) -> str:
    """The answer to Introspect, for an object with these interfaces and direct child nodes."""
    lines = [DOCTYPE + "<node>"]
    for name in interfaces:
        lines += _interface(name, INTERFACES[name])
    lines += [f' <node name="{child}"/>' for child in children]
    return "\n".join([*lines, "</node>"]) + "\n"


def _interface(name: str, interface: Interface) -> list[str]:
    lines = [f' <interface name="{name}">']
    for member, method in interface.methods.items():
        lines.append(f'  <method name="{member}">')
        lines += [_arg(*arg, direction="in") for arg in method.takes]
        lines += [_arg(*arg, direction="out") for arg in method.gives]
        lines.append("  </method>")
    for member, args in interface.signals.items():
        lines.append(f'  <signal name="{member}">')
        lines += [_arg(*arg) for arg in args]
        lines.append("  </signal>")
    for member, prop in interface.properties.items():
        lines.append(f'  <property name="{member}" type="{prop.signature}" access="read">')
        if prop.emits != "true":
            lines.append(
                f'   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="{prop.emits}"/>'
            )
        lines.append("  </property>")
    lines.append(" </interface>")
    return lines


def _arg(name: str, signature: str, *, direction: str = "") -> str:
    way = f' direction="{direction}"' if direction else ""
    return f'   <arg name="{name}" type="{signature}"{way}/>'
