# SPDX-License-Identifier: LGPL-2.1-or-later
"""The members of D-Bus interfaces, for both the server and Introspect.

The interfaces of /org/virtd1 and of D-Bus itself are here; each kind of object has its own in a module (kinds.py).

Nothing is escaped in the XML: D-Bus names contain no character that needs it, and xml.sax.saxutils imports an HTTP
client, which costs the daemon 4 MB of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

MANAGER: Final = "org.virtd1.Manager"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
PEER: Final = "org.freedesktop.DBus.Peer"

DOCTYPE: Final = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)


def _parted(text: str) -> list[tuple[str, str, str]]:
    return [item.partition(":") for item in text.split()]


class Args(msgspec.Struct, frozen=True):
    """Arguments: "name:signature" each, or "name=source:signature", separated by spaces."""

    text: str = ""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Names and signatures, as in Introspect's answer."""
        for item in self.text.split():
            name, _, signature = item.partition(":")
            yield name.partition("=")[0], signature

    @property
    def sources(self) -> list[tuple[str, str]]:
        """Each argument's name on Varlink, and its signature."""
        return [(name.rpartition("=")[2], signature) for name, _, signature in _parted(self.text)]

    @property
    def signature(self) -> str:
        return "".join(item.partition(":")[2] for item in self.text.split())


class Method(msgspec.Struct, frozen=True):
    """A method: its operation (virtd.host.access), its arguments, and the parts of the reply that it returns.

    An argument is the operation's parameter of that name, and a return value the reply's field; "name=other" if that
    has another name, with a dot for a nested field.
    """

    operation: str
    takes: Args = Args()
    gives: Args = Args()


class Property(msgspec.Struct, frozen=True):
    """A property, read-only like all of ours; `emits` is its EmitsChangedSignal."""

    signature: str
    emits: str = "true"


class Interface(msgspec.Struct, frozen=True):
    """Methods, properties and signals by name."""

    methods: dict[str, Method] = {}
    properties: dict[str, Property] = {}
    signals: dict[str, Args] = {}


def methods(interface: str, **methods: tuple[str, str, str]) -> dict[str, Method]:
    """Each with the operation's name in `interface`, its arguments and its return values."""
    return {
        name: Method(f"{interface}.{operation}", Args(takes), Args(gives))
        for name, (operation, takes, gives) in methods.items()
    }


# Common to all objects.
COMMON: Final = {
    "Name": Property("s", "const"),
    "Driver": Property("s", "const"),
    "Uuid": Property("s", "const"),
    "State": Property("s"),
    "Reason": Property("s"),
    "Since": Property("s"),
    "Autostart": Property("b"),
}
# For objects that run as a process in a unit of their own.
SUPERVISED: Final = COMMON | {
    "Unit": Property("s", "const"),
    "Pid": Property("u"),
    "Exit": Property("a{sv}", "invalidates"),
}

DEFINE: Final = ("Define", "text:s source:s check:b", "name:s uuid:s created:b file=path:s warnings:as")
# Methods of both domains and containers.
GUEST: Final = {
    "Info": ("Info", "", "info=object:a{sv}"),
    "Dump": ("Dump", "", "text:s"),
    "Wait": ("Wait", "states:as timeout:d", "state=object.state:s"),
    "Start": ("Start", "", "changed:b"),
    "Shutdown": ("Shutdown", "timeout:d", "changed:b"),
    "Stop": ("Stop", "", "changed:b"),
    "Kill": ("Kill", "signal:i", ""),
    "SetAutostart": ("Autostart", "enable:b", "changed:b"),
    "Undefine": ("Undefine", "", ""),
}

OWN: Final[dict[str, Interface]] = {
    MANAGER: Interface(
        methods=methods(
            "org.virtd1",
            List=("List", "", "domains=objects:a(sossus)"),  # name, path, uuid, state, pid, reason
            Status=("Status", "", "status:a{sv}"),
            Define=DEFINE,
            Check=("Check", "", "differences:aa{sv} objects:u"),
            Repair=("Repair", "", "differences:aa{sv} objects:u"),
            Reload=("Reload", "", "changed:as problems:aa{sv}"),
        ),
        properties={
            "Version": Property("s", "const"),
            "Domains": Property("u"),
            "Running": Property("u"),
        },
    ),
    INTROSPECTABLE: Interface(methods=methods(INTROSPECTABLE, Introspect=("Introspect", "", "xml:s"))),
    PROPERTIES: Interface(
        methods=methods(
            PROPERTIES,
            Get=("Get", "interface:s property:s", "value:v"),
            GetAll=("GetAll", "interface:s", "properties:a{sv}"),
            Set=("Set", "interface:s property:s value:v", ""),
        ),
        signals={"PropertiesChanged": Args("interface:s changed:a{sv} invalidated:as")},
    ),
    OBJECT_MANAGER: Interface(
        methods=methods(OBJECT_MANAGER, GetManagedObjects=("GetManagedObjects", "", "objects:a{oa{sa{sv}}}")),
        signals={
            "InterfacesAdded": Args("object:o interfaces:a{sa{sv}}"),
            "InterfacesRemoved": Args("object:o interfaces:as"),
        },
    ),
    # GDBus answers its calls.
    PEER: Interface(methods=methods(PEER, Ping=("Ping", "", ""), GetMachineId=("GetMachineId", "", "id:s"))),
}


def document(interfaces: Mapping[str, Interface], children: Iterable[str]) -> str:
    """The answer to Introspect, for an object with these interfaces and direct child nodes."""
    lines = [DOCTYPE + "<node>"]
    for name, interface in interfaces.items():
        lines += _interface(name, interface)
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
