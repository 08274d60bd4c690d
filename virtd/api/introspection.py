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
CONTAINER: Final = "org.virtd1.Container"
CONTAINER_MANAGER: Final = "org.virtd1.ContainerManager"
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


def _parted(text: str) -> list[tuple[str, str, str]]:
    return [item.partition(":") for item in text.split()]


class Args(msgspec.Struct, frozen=True):
    """Arguments: "name:signature" each, or "name=source:signature", separated by spaces."""

    text: str = ""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Names and signatures, as Introspect tells them."""
        for item in self.text.split():
            name, _, signature = item.partition(":")
            yield name.partition("=")[0], signature

    @property
    def sources(self) -> list[tuple[str, str]]:
        """What each is called on Varlink, and its signature."""
        return [(name.rpartition("=")[2], signature) for name, _, signature in _parted(self.text)]

    @property
    def signature(self) -> str:
        return "".join(item.partition(":")[2] for item in self.text.split())


class Method(msgspec.Struct, frozen=True):
    """A method: the operation that it is (virtd.host.access), what it takes, and what it gives of the reply.

    An argument is the operation's parameter of that name, and a value the reply's; "name=other" where that is called
    otherwise, with a dot for what is inside of something.
    """

    operation: str
    takes: Args = Args()
    gives: Args = Args()


class Property(msgspec.Struct, frozen=True):
    """A property, read-only as all of ours are; `emits` is its EmitsChangedSignal."""

    signature: str
    emits: str = "true"


class Interface(msgspec.Struct, frozen=True):
    """Methods, properties and signals by name."""

    methods: dict[str, Method] = {}
    properties: dict[str, Property] = {}
    signals: dict[str, Args] = {}


def _methods(interface: str, **methods: tuple[str, str, str]) -> dict[str, Method]:
    """Each with the operation's name in `interface`, what it takes and what it gives."""
    return {
        name: Method(f"{interface}.{operation}", Args(takes), Args(gives))
        for name, (operation, takes, gives) in methods.items()
    }


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

DEFINE: Final = ("Define", "text:s source:s check:b", "name:s uuid:s created:b file=path:s warnings:as")
# What domains and containers can both be asked.
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

INTERFACES: Final[dict[str, Interface]] = {
    MANAGER: Interface(
        methods=_methods(
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
    DOMAIN: Interface(
        methods=_methods(
            "org.virtd1",
            **GUEST,
            Reboot=("Reboot", "force:b", "changed:b"),
            Suspend=("Suspend", "", "changed:b"),
            Resume=("Resume", "", "changed:b"),
            UpgradeMachine=("UpgradeMachine", "", "changed:b"),
        ),
        properties=SUPERVISED
        | {
            "Id": Property("i"),
        },
        signals={"Ended": Args("exit:a{sv}")},
    ),
    NETWORK_MANAGER: Interface(
        methods=_methods(
            "org.virtd1.Network",
            Define=DEFINE,
            DefineDefault=("DefineDefault", "", DEFINE[2]),
        )
    ),
    NETWORK: Interface(
        methods=_methods(
            "org.virtd1.Network",
            Info=("Info", "", "info=object:a{sv}"),
            Dump=("Dump", "", "text:s"),
            Leases=("Leases", "", "leases:aa{sv}"),
            Start=("Start", "", "changed:b"),
            Stop=("Stop", "force:b", "changed:b"),
            SetAutostart=("Autostart", "enable:b", "changed:b"),
            Undefine=("Undefine", "", ""),
        ),
        properties=COMMON
        | {
            "Pid": Property("u"),
            "Mode": Property("s"),
            "Bridge": Property("s"),
            "Addresses": Property("as"),
        },
    ),
    CONTAINER_MANAGER: Interface(methods=_methods("org.virtd1.Container", Define=DEFINE)),
    CONTAINER: Interface(
        methods=_methods(
            "org.virtd1.Container",
            **GUEST,
            Reboot=("Reboot", "timeout:d", "changed:b"),
            Freeze=("Freeze", "", "changed:b"),
            Thaw=("Thaw", "", "changed:b"),
        ),
        properties=SUPERVISED
        | {
            "Addresses": Property("as", "invalidates"),
        },
        signals={"Ended": Args("exit:a{sv}")},
    ),
    POOL_MANAGER: Interface(
        methods=_methods("org.virtd1.Pool", Define=(*DEFINE[:2], "name:s uuid:s created:b path:s warnings:as"))
        | _methods(
            "org.virtd1.Volume",
            ListJobs=("Jobs", "", "jobs=objects:aa{sv}"),
            WaitJob=("Await", "job:s timeout:d", "job=object:a{sv}"),
            CancelJob=("Cancel", "job:s", "changed:b"),
            # Everything has been written to what UploadVolume gave: the job that goes on, "" when all is done.
            Uploaded=("Uploaded", "job:s", "job:s"),
        ),
    ),
    POOL: Interface(
        methods=_methods(
            "org.virtd1.Pool",
            Info=("Info", "", "info=object:a{sv}"),
            Dump=("Dump", "", "text:s"),
            Start=("Start", "", "changed:b"),
            Stop=("Stop", "", "changed:b"),
            Refresh=("Refresh", "", "volumes:x"),
            SetAutostart=("Autostart", "enable:b", "changed:b"),
            Undefine=("Undefine", "", ""),
        )
        | _methods(
            "org.virtd1.Volume",
            ListVolumes=("List", "", "volumes=objects:aa{sv}"),
            VolumeInfo=("Info", "volume=name:s", "info=object:a{sv}"),
            ListSnapshots=("Snapshots", "volume=name:s", "snapshots=objects:aa{sv}"),
            # Each gives the job that goes on, "" when all is done.
            CreateVolume=("Create", "volume=name:s size:s format:s", "job:s"),
            CloneVolume=("Clone", "volume=source:s to=name:s", "job:s"),
            # `from` is the image's format, which is never guessed; without a file, of what is there under that name.
            ImportVolume=("Import", "volume=name:s file:s from=source_format:s format:s", "job:s"),
            ResizeVolume=("Resize", "volume=name:s size:s", "job:s"),
            WipeVolume=("Wipe", "volume=name:s", "job:s"),
            DeleteVolume=("Delete", "volume=name:s", "job:s"),
            # `content` is to be written from `offset` on, more than 0 only with `resume`. Size 0: not known.
            UploadVolume=("Upload", "volume=name:s format:s size:t resume:b", "job:s content:h offset:t"),
            DownloadVolume=("Download", "volume=name:s", "format:s content:h"),
        ),
        properties=COMMON
        | {
            "Type": Property("s"),
            "Path": Property("s"),
            "Capacity": Property("t"),
            "Allocation": Property("t"),
            "Available": Property("t"),
        },
    ),
    INTROSPECTABLE: Interface(methods=_methods(INTROSPECTABLE, Introspect=("Introspect", "", "xml:s"))),
    PROPERTIES: Interface(
        methods=_methods(
            PROPERTIES,
            Get=("Get", "interface:s property:s", "value:v"),
            GetAll=("GetAll", "interface:s", "properties:a{sv}"),
            Set=("Set", "interface:s property:s value:v", ""),
        ),
        signals={"PropertiesChanged": Args("interface:s changed:a{sv} invalidated:as")},
    ),
    OBJECT_MANAGER: Interface(
        methods=_methods(OBJECT_MANAGER, GetManagedObjects=("GetManagedObjects", "", "objects:a{oa{sa{sv}}}")),
        signals={
            "InterfacesAdded": Args("object:o interfaces:a{sa{sv}}"),
            "InterfacesRemoved": Args("object:o interfaces:as"),
        },
    ),
    # GDBus answers its calls.
    PEER: Interface(methods=_methods(PEER, Ping=("Ping", "", ""), GetMachineId=("GetMachineId", "", "id:s"))),
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
