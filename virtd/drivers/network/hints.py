# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands that have somebody else's firewall let through what guests need, in the words of the tool that it is kept
with: nft, iptables, ufw, firewall-cmd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...hints import do
from .probe import ANSWERED, BRIDGED, INPUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...hints import Hint
    from .probe import Trial

SERVICES = {
    "DHCP": (("udp", 67),),
    "DNS": (("udp", 53), ("tcp", 53)),
    "DHCPv6": (("udp", 547),),
    "ICMPv6": (("ipv6-icmp", 0),),
}
ANSWERS, FORWARDED = ("ct state established,related", "RELATED,ESTABLISHED"), ("ct status dnat", "DNAT")


class Chain(NamedTuple):
    """A base chain in which packets are dropped.

    `family` "legacy": what drops them isn't nftables, and without a table not iptables either. `whose`: "docker",
    "ufw", "firewalld", "iptables", if that is known, or how the tool of legacy iptables is called. `early`: before
    connections are tracked.
    """

    family: str
    table: str
    name: str
    hook: str
    whose: str
    early: bool = False


class Pass(NamedTuple):
    """What shall be let through: `source` and `to` are addresses, `state` in the words of nft and of iptables."""

    iif: str = ""
    oif: str = ""
    source: str = ""
    to: str = ""
    protocol: str = ""
    port: int = 0
    state: tuple[str, str] = ("", "")


def commands(chain: Chain, trials: list[Trial], bridge: str) -> list[Hint]:
    """For what is dropped in a chain, all of it on the same way."""
    if chain.whose == "firewalld":
        return [f"firewall-cmd --zone=virtd --change-interface={bridge}"]
    if chain.family == "bridge":
        # By the names of domains' and containers' ports: to ask for the bridge's own not every kernel has.
        passes = [one for mine in ("vt-*", "vl*") for one in (Pass(mine), Pass(oif=mine))]
    else:
        passes = list(dict.fromkeys(one for trial in trials for one in _passes(chain, trial, bridge)))
    if chain.whose == "ufw":
        return [_ufw(one, chain) for one in passes if one.state != ANSWERS]  # these it lets through anyway
    if chain.whose:
        found: list[Hint] = [_iptables(one, chain) for one in passes]
        return [*found, do("reload")] if chain.family == "legacy" else found  # its changes are told to nobody
    if chain.family == "legacy":
        return [f"tc filter show dev {bridge} ingress", "bpftool net show"]
    return [f"nft insert rule {chain.family} {chain.table} {chain.name} '{_nft(one)}'" for one in passes]


def _passes(chain: Chain, trial: Trial, bridge: str) -> Iterator[Pass]:
    if trial.end == INPUT and chain.hook in ("prerouting", "input"):
        for protocol, port in SERVICES[trial.what]:
            yield Pass(bridge, protocol=protocol, port=port)
    elif trial.end == ANSWERED:
        yield Pass(oif=bridge, protocol="udp", port=68)
    elif trial.end == BRIDGED and chain.hook == "forward":
        yield Pass(bridge, bridge)
    elif trial.end == BRIDGED and chain.hook == "postrouting":
        yield Pass(oif=bridge)
    elif not trial.via and chain.hook == "postrouting":
        yield Pass(source=trial.source)  # where iptables takes no interface that something came in by
    elif not trial.via:
        yield Pass(bridge)
        if chain.hook == "forward":
            yield Pass(oif=bridge, state=ANSWERS)
    elif chain.hook in ("forward", "postrouting"):
        yield Pass(oif=bridge, state=ANSWERS if trial.connection is not None else FORWARDED)
    elif trial.connection is not None and chain.early:
        yield Pass(trial.via, to=trial.connection.host)
    elif trial.connection is not None:
        yield Pass(trial.via, state=ANSWERS)
    else:
        yield Pass(trial.via, protocol=trial.port[0], port=trial.port[1])


def _nft(one: Pass) -> str:
    words = [f'{way} "{name}"' for way, name in (("iifname", one.iif), ("oifname", one.oif)) if name]
    words += [
        f"{'ip6' if ':' in address else 'ip'} {way} {address}"
        for way, address in (("saddr", one.source), ("daddr", one.to))
        if address
    ]
    if one.protocol:
        words.append(f"{one.protocol} dport {one.port}" if one.port else f"meta l4proto {one.protocol}")
    return " ".join([*words, *filter(None, one.state[:1]), "accept"])


def _iptables(one: Pass, chain: Chain) -> str:
    tool = chain.whose if chain.family == "legacy" else "ip6tables" if chain.family == "ip6" else "iptables"
    words = [tool, *(["-t", chain.table] if chain.table not in ("", "filter") else [])]
    words += ["-I", "DOCKER-USER" if chain.whose == "docker" else chain.name]
    ways = (("-i", one.iif), ("-o", one.oif), ("-s", one.source), ("-d", one.to))
    words += [f"{way} {name}" for way, name in ways if name]
    words += [f"-p {one.protocol}"] if one.protocol else []
    words += [f"--dport {one.port}"] if one.port else []
    words += [f"-m conntrack --ctstate {one.state[1]}"] if one.state[1] else []
    return " ".join([*words, "-j ACCEPT"])


def _ufw(one: Pass, chain: Chain) -> str:
    ways = [f"{way} on {name}" for way, name in (("in", one.iif), ("out", one.oif)) if name]
    if chain.hook == "forward":
        return f"ufw route allow {' '.join(ways)}"
    return " ".join(["ufw allow", *ways, f"proto {one.protocol} to any port {one.port}"])
