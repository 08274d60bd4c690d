# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands that make other parties' firewalls accept what guests need, for the tool that manages each: nft, iptables,
ufw or firewall-cmd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...hints import do
from .probe import ANSWERED, BRIDGED, INPUT, RESOLVED

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

    `family` "legacy": not nftables; without a `table` not iptables either. `whose`: "docker", "ufw", "firewalld" or
    "iptables", if that is known, or the name of legacy iptables' tool. `early`: before connection tracking.
    """

    family: str
    table: str
    name: str
    hook: str
    whose: str
    early: bool = False


class Pass(NamedTuple):
    """What to accept: `source` and `to` are addresses, `state` is written as nft and iptables both do."""

    iif: str = ""
    oif: str = ""
    source: str = ""
    to: str = ""
    protocol: str = ""
    port: int = 0
    state: tuple[str, str] = ("", "")


def commands(chain: Chain, trials: list[Trial], bridge: str) -> list[Hint]:
    """The commands for trials that were dropped in one chain, all with the same `end`."""
    if chain.whose == "firewalld":
        return [f"firewall-cmd --zone=virtd --change-interface={bridge}"]
    if chain.family == "bridge":
        # By the name patterns of domains' and containers' ports: not every kernel can match the bridge itself.
        passes = [one for mine in ("vt-*", "vl*") for one in (Pass(mine), Pass(oif=mine))]
    else:
        passes = list(dict.fromkeys(one for trial in trials for one in _passes(chain, trial, bridge)))
    if chain.whose == "ufw":
        return [_ufw(one, chain) for one in passes if one.state != ANSWERS]  # ufw accepts answers anyway
    if chain.whose:
        found: list[Hint] = [_iptables(one, chain) for one in passes]
        return [*found, do("reload")] if chain.family == "legacy" else found  # legacy changes aren't announced
    if chain.family == "legacy":
        return [f"tc filter show dev {bridge} ingress", "bpftool net show"]
    return [f"nft insert rule {chain.family} {chain.table} {chain.name} '{_nft(one)}'" for one in passes]


def _passes(chain: Chain, trial: Trial, bridge: str) -> Iterator[Pass]:
    if trial.end == INPUT and chain.hook in ("prerouting", "input"):
        for protocol, port in SERVICES[trial.what]:
            yield Pass(bridge, protocol=protocol, port=port)
    elif trial.end == RESOLVED:
        yield Pass(oif=bridge) if chain.hook in ("output", "egress") else Pass(bridge)
    elif trial.end == ANSWERED:
        yield Pass(oif=bridge, protocol="udp", port=68)
    elif trial.end == BRIDGED and chain.hook == "forward":
        yield Pass(bridge, bridge)
    elif trial.end == BRIDGED and chain.hook == "postrouting":
        yield Pass(oif=bridge)
    elif not trial.via and chain.hook == "postrouting":
        yield Pass(source=trial.source)  # for iptables where it can't match the input interface
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
