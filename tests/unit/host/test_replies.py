# SPDX-License-Identifier: LGPL-2.1-or-later
"""The replies: the names that scripts use stay, and what is described is what is sent."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from virtd.api import idl, interfaces, types, wire
from virtd.replies import Reply

GUEST = "name driver uuid state reason pid since autostart waits id"
INFO = f"{GUEST} unit slots exit definition_path pending persistent log console_log problems"
NETWORK = "name driver uuid state reason pid since autostart waits mode bridge ipv4 ipv6"
POOL = "name driver uuid state reason since autostart waits type path capacity allocation available"
VOLUME = "pool name path format capacity allocation backing used_by job trouble"
# What `--json` had before there were Structs. Names may be added, and none may go.
BEFORE = {
    "Guest": GUEST,
    "Exit": "code signal cause at by",
    "DomainInfo": f"{INFO} memory vcpus machine disks cdroms nics monitor standstill events vnc",
    "Nic": "network mode mac interface addresses",
    "Standstill": "kind since disk path operation full reason",
    "Events": "taken hung_up",
    "ContainerInfo": f"{INFO} rootfs volume argv hostname privileged ids limits used addresses interfaces",
    "Network": NETWORK,
    "NetworkInfo": f"{NETWORK} unit slots domain mtu ranges users ports leases forwards persistent pending"
    " definition_path log problems",
    "Port": "interface user mac trusted ipv4 refused",
    "Lease": "address family mac name expires",
    "Pool": POOL,
    "PoolInfo": f"{POOL} source fstype options persistent pending definition_path problems",
    "Volume": VOLUME,
    "Backing": "pool volume",
    "VolumeInfo": f"{VOLUME} chain snapshots backing_of",
    "Link": "pool volume format path",
    "Snapshot": "id name at state",
    "Job": "job verb pool volume state progress by since pid error",
    "Status": "version pid since recovered budget domains objects jobs problems degraded",
    "Recovered": "objects ms adopted ended rolled_back rebuilt",
    "Budget": "used max limited_by",
    "Slot": "name kept_as what",
    "Difference": "kind object text repair repaired",
    "Problem": "object text hint",
    "Trouble": "text hint",
}
# The replies that are told field by field in the methods' own text.
SPELT = {
    "Changed": "org.virtd1.Stop",
    "Started": "org.virtd1.Start",
    "Defined": "org.virtd1.Define",
    "Named": "org.virtd1.Undefine",
    "Checked": "org.virtd1.Check",
    "Reloaded": "org.virtd1.Reload",
    "Place": "org.virtd1.Follow",
    "Change": "org.virtd1.Subscribe",
    "Made": "org.virtd1.Container.Create",
    "Refreshed": "org.virtd1.Pool.Refresh",
    "Begun": "org.virtd1.Volume.Create",
    "Uploading": "org.virtd1.Volume.Upload",
    "Downloading": "org.virtd1.Volume.Download",
    "Cancelled": "org.virtd1.Volume.Cancel",
}


def gives(operation: str) -> dict[str, str]:
    """What a method's text says that it gives: types by name."""
    interface, _, name = operation.rpartition(".")
    found = re.search(rf"^method {name}\([^)]*\) -> \(([^)]*)\)", idl.text(interface), re.MULTILINE)
    assert found is not None
    parted = (item.split(": ") for item in found[1].replace("\n", " ").strip().split(", "))
    return {key.strip(): kind for key, kind in parted}


@pytest.mark.parametrize("name", BEFORE)
def test_fields_are_called_as_they_were(name: str) -> None:
    fields = types.structs()[name].__struct_fields__
    assert [field for field in fields if field in BEFORE[name].split()] == BEFORE[name].split()


@pytest.mark.parametrize("name", SPELT)
def test_a_reply_is_as_its_methods_text_says(name: str) -> None:
    wanted: list[str] = []
    told = gives(SPELT[name])
    for field, hint in types.fields(types.structs()[name]).items():
        inner = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
        assert told.pop(field) == types.written(inner, wanted)
    assert not told


def test_every_reply_is_a_frozen_struct() -> None:
    for name, cls in types.structs().items():
        assert issubclass(cls, Reply)
        assert cls.__struct_config__.frozen, name
        assert cls.__doc__, name


@pytest.mark.parametrize("interface", interfaces.MODULES)
def test_a_description_has_every_type_that_it_names_once_and_no_other(interface: str) -> None:
    text = types.description(interface)
    assert text.startswith(idl.text(interface).rstrip("\n"))
    defined = re.findall(r"^type (\w+) \($", text, re.MULTILINE)
    code = re.sub(r"#.*", "", text)
    named = set(re.findall(r": \??(?:\[\w*\])*\??([A-Z]\w*)", code))
    assert sorted(defined) == sorted(named)
    # Nothing but the environment of a command and the limits of a container is an object of any form.
    assert set(re.findall(r"(\w+): \??(?:\[\w*\])*object", code)) <= {"environment", "object"}


def test_methods_give_real_types() -> None:
    for interface in interfaces.MODULES:
        for name in interfaces.methods(interface):
            if name != "Subscribe":  # an event's object is of any kind
                assert not any("object" in kind for kind in gives(f"{interface}.{name}").values()), name


def test_what_is_no_utf8_can_be_sent_from_inside_of_a_reply() -> None:
    reply: Any = types.structs()["Problem"](object="qemu/a", text="a\udcff", hint="")
    sent = msgspec.json.decode(wire.encode({"parameters": {"problems": [reply]}}))
    assert sent["parameters"]["problems"][0]["object"] == "qemu/a"


def test_a_field_can_be_read_by_name() -> None:
    reply = types.structs()["Gone"](name="a", driver="qemu")
    assert reply["name"] == "a"
    assert "uuid" not in reply
    assert reply.get("uuid", "none") == "none"
    with pytest.raises(KeyError):
        reply["uuid"]
