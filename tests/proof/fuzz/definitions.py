# SPDX-License-Identifier: LGPL-2.1-or-later
"""Definitions of all kinds, and what is written for other programs from those that are taken.

The first byte says which kind. Only root defines; but what is wrong must be said, and must change nothing.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import msgspec

from virtd import errors
from virtd.drivers.lxc import config
from virtd.drivers.network import dnsmasq, firewall
from virtd.drivers.network.ports import Ground
from virtd.model import container, domain, network, networkchecks, pool, settings
from virtd.objects import definitions

if TYPE_CHECKING:
    from collections.abc import Callable

PARSERS: tuple[Callable[[str, str], Any], ...] = (
    domain.parse,
    container.parse,
    networkchecks.parse,
    pool.parse,
    settings.parse,
)
SEEDS = (
    b"""\0name = "web1"
memory = "256M"
uuid = "6f9619ff-8b86-d011-b42d-00c04fc964ff"
vcpus = 2
on_reboot = "stop"
[boot]
kernel = "/boot/vmlinuz"
cmdline = "console=ttyS0"
[[disk]]
path = "/srv/a.qcow2"
format = "qcow2"
bus = "scsi"
serial = "SN1"
[[disk]]
pool = "default"
volume = "b"
bus = "nvme"
[[cdrom]]
path = "/srv/a.iso"
[[nic]]
network = "default"
mac = "52:54:00:12:34:56"
[vnc]
enabled = true
[guest]
hostname = "web1"
ssh_keys = ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f me"]
user_data = "/srv/user-data"
[guest.credentials]
"a.b" = "/srv/secret"
""",
    b"""\1name = "box"
rootfs = "/srv/box"
hostname = "box"
command = ["/bin/sh", "-c", "exec sleep 5"]
drop_capabilities = ["net_raw"]
[limits]
memory = "1G"
cpus = 1.5
pids = 100
[environment]
A = "b c"
[[mount]]
source = "/srv/data"
target = "/data"
readonly = true
[[nic]]
network = "default"
""",
    b"""\2name = "default"
mode = "nat"
bridge = "virbr7"
domain = "lan"
mtu = 1400
dnsmasq = ["log-queries"]
[ipv4]
address = "192.168.150.1/24"
first = "192.168.150.10"
last = "192.168.150.99"
lease = "1h"
[ipv6]
address = "fd00:1::1/64"
[[host]]
mac = "52:54:00:12:34:56"
ipv4 = "192.168.150.5"
name = "web1"
[[record]]
name = "db"
address = "192.168.150.6"
[[forward]]
protocol = "tcp"
port = 8080
to = "192.168.150.5"
to_port = 80
""",
    b"""\3name = "data"
type = "filesystem"
path = "/srv/data"
source = "/dev/vdb1"
fstype = "ext4"
options = "ro"
""",
    b'\4[log]\nmax_size = "1M"\nbackups = 2\n[qemu]\nstart_timeout = 5\n[lxc]\ndirectory = "/srv"\n',
)
WORDS = (
    b"\\n", b"\\u0000", b"\\u0085", b"\\u2028", b"\\r", b"1979-05-27T07:32:00Z", b"inf", b"nan", b"0x10",
    b"'''", b'"""', b"autostart = false\n", b"trusted = true\n", b"/24", b"::1", b"169.254.0.1/16", b"= {a = 1}",
    b"[[nic]]\n", b"[[",
)  # fmt: skip
FILES = dnsmasq.files_in("/run/virtd/network/default", "/var/lib/virtd/network/default")
HOST = config.HostFacts("/p", "/p/box", "/srv/box", None, False, "", "SIGPWR", "", False, "lxc-start")


def target(data: bytes) -> None:
    parse = PARSERS[data[0] % len(PARSERS)] if data else domain.parse
    try:
        text = data[1:].decode()
    except UnicodeDecodeError:
        return
    with contextlib.suppress(errors.InvalidDefinition):
        found = parse(text, "a.toml")
        _kept(found)
        if isinstance(found, network.Network):
            _network(found)
        elif isinstance(found, container.Container):
            _container(found)
        if hasattr(found, "autostart"):
            _autostart(found, text, parse)


def _kept(found: Any) -> None:
    """A record holds it in JSON, for the next daemon."""
    again = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(found)))
    assert msgspec.convert(again, type(found)) == found, "it isn't the same any more once it was on record"


def _autostart(found: Any, text: str, parse: Callable[[str, str], Any]) -> None:
    with contextlib.suppress(errors.InvalidDefinition):  # the key was written in a way that a pattern doesn't find
        changed = parse(definitions.with_autostart(text, enable=not found.autostart), "a.toml")
        assert changed == msgspec.structs.replace(found, autostart=not found.autostart), "more than autostart changed"


def _network(found: network.Network) -> None:
    """No value is more than a value in a file of dnsmasq's, or in nftables' rules."""
    fixed = msgspec.structs.replace(found, dnsmasq=())
    for text, most in (
        (dnsmasq.config(fixed, FILES), 40),
        (dnsmasq.hosts(found), len(found.host)),
        (dnsmasq.names(found), len(found.record) + 2 * len(found.host)),
        (firewall.rules(Ground(found, "56:44:00:00:00:01", ())), 200 + 12 * len(found.forward)),
    ):
        assert text.isascii(), text
        assert text.isprintable() or all(one.isprintable() or one in "\n\t" for one in text), text
        assert text.count("\n") <= most + 60, text


def _container(found: container.Container) -> None:
    """Each line of LXC's configuration is one that we wrote."""
    for line in config.text(found, HOST, []).split("\n")[:-1]:
        assert line.startswith("lxc."), line
        assert not {"\0", "\r"} & set(line), line
    config.stop_script(found, HOST, "lxc-stop", 5)
    assert "\0" not in config.start_script(found, HOST)
