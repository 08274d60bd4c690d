# SPDX-License-Identifier: LGPL-2.1-or-later
"""What keeps guests of a network from doing what they do: somebody else's firewall, and what is said of it.

A packet has to pass the rules of everybody at each hook that it comes by; none of ours overrules what another drops.
That isn't ours to change: the chain is named, and the commands that have it let through what guests need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .. import programs
from ..protocol import Problem
from . import firewall, host, trials
from .probe import BRIDGED, FORWARD, INPUT, Probe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .ports import Ground
    from .probe import Lost, Trial
    from .trace import Step

BUILT_IN = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}  # the chains of iptables, also of its nft kind
# What an accepting rule has to say of it, as nft does and as iptables.
PORTS = {"DHCP": (67,), "DNS": (53,), "DHCPv6": (547,)}


class Chain(NamedTuple):
    """A base chain in which packets are dropped.

    `family` "legacy" and no table: what drops them isn't nftables. `whose`: "docker", "ufw", "firewalld", "iptables",
    if that is known, or how the tool of legacy iptables is called.
    """

    family: str
    table: str
    name: str
    hook: str
    whose: str


class Drop(NamedTuple):
    """Of one trial. `rule`: as nft lists it, "" for the policy of the chain; `within`: the chain that it is in."""

    chain: Chain
    rule: str
    within: str
    trial: Trial


class Obstacle(NamedTuple):
    """`unheard`: it may go away without a word from the kernel."""

    problem: Problem
    unheard: bool


def find(ground: Ground) -> list[Obstacle]:
    """Try what guests of an active network do. Raises HostError, or OSError, where that can't be done.

    It takes some tens of milliseconds, or a second where much is dropped.
    """
    tried = trials.of(ground)
    if not tried:
        return []
    with Probe(ground.network.bridge_name, tried) as probe:
        lost = probe.lost()
        return judged(lost, firewall.chains(), ground.network.bridge_name) if lost else []


def judged(lost: Iterable[Lost], chains: list[dict[str, Any]], bridge: str) -> list[Obstacle]:
    """Who is at fault for what got lost. `chains`: all that there are, see firewall.py. Raises NftError."""
    groups: dict[tuple[Chain, str], list[Drop]] = {}
    for one in lost:
        if (drop := _blame(one, chains)) is not None:
            groups.setdefault((drop.chain, drop.trial.end), []).append(drop)
    return [
        Obstacle(_problem(chain, end, mine, bridge), chain.family == "legacy" or end == BRIDGED)
        for (chain, end), mine in groups.items()
    ]


def _blame(lost: Lost, chains: list[dict[str, Any]]) -> Drop | None:
    """None where nobody's firewall is known to be at fault."""
    dropped = next((step for step in lost.steps if step.verdict == "drop"), None)
    if dropped is None:
        return _not_nftables(lost)
    if firewall.is_ours(dropped.table):
        return None
    family, table, base = dropped.family, dropped.table, _base(dropped, lost.steps)
    mine = {one["name"]: one.get("hook", "") for one in chains if (one["family"], one["table"]) == (family, table)}
    hook = mine.get(base, "")
    rule = firewall.rule(family, table, dropped.chain, dropped.handle) if dropped.handle else ""
    return Drop(Chain(family, table, base, hook, _whose(dropped, hook, mine)), rule, dropped.chain, lost.trial)


def _whose(dropped: Step, hook: str, chains: Iterable[str]) -> str:
    """By the names of the chains in its table; what needs a tool that isn't there is nobody's."""
    names = set(chains)
    if dropped.table == "firewalld":
        return "firewalld"
    if any(name.startswith(("ufw-", "ufw6-")) for name in names):
        return "ufw"
    if dropped.family not in ("ip", "ip6") or not programs.find(
        "ip6tables" if dropped.family == "ip6" else "iptables"
    ):
        return ""
    if "DOCKER-USER" in names and hook == "forward":
        return "docker"
    return "iptables" if len(names & BUILT_IN) > 1 else ""  # it makes all of a table's


def _base(dropped: Step, steps: tuple[Step, ...]) -> str:
    """The base chain from which a packet came to the chain that dropped it."""
    chain = dropped.chain
    for step in reversed(steps[: steps.index(dropped)]):
        if (step.family, step.table, step.target) == (dropped.family, dropped.table, chain):
            chain = step.chain
    return chain


def _not_nftables(lost: Lost) -> Drop | None:
    if not lost.hook or lost.through:
        return None  # its way ended elsewhere: there is no route, say
    four = lost.trial.version == 4
    tool = "iptables-legacy" if four else "ip6tables-legacy"
    whose = tool if host.legacy_tables("ip_tables_names" if four else "ip6_tables_names") else ""
    return Drop(Chain("legacy", "", lost.hook.upper(), lost.hook, whose), "", "", lost.trial)


def _listed(words: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(words))


def _problem(chain: Chain, end: str, drops: list[Drop], bridge: str) -> Problem:
    if end == INPUT:
        what = f"What its guests ask of the host ({_listed(one.trial.what for one in drops)})"
    else:
        what = f"{drops[0].trial.what} ({_listed(f'IPv{one.trial.version}' for one in drops)})"
    text = f"{what} is dropped by {_named(chain, drops)}"
    if end == BRIDGED and chain.family != "bridge":
        text += ", to which br_netfilter shows what goes over a bridge"
    return Problem(text, "; ".join(_hint(chain, end, drops, bridge)))


def _named(chain: Chain, drops: list[Drop]) -> str:
    if chain.family == "legacy":
        if chain.whose:
            return f"legacy iptables, in its chain {chain.name}"
        return f"something that is neither nftables nor iptables, at the hook {chain.hook}: a BPF program, say"
    name = f"the chain {chain.family} {chain.table} {chain.name}"
    rules = [f"“{one.rule}”{f' in {one.within}' if one.within != chain.name else ''}" for one in drops if one.rule]
    return f"{name} ({_listed(rules)})" if rules else f"{name}, by its policy"


def _hint(chain: Chain, end: str, drops: list[Drop], bridge: str) -> list[str]:
    """Commands that help."""
    whats = {one.trial.what for one in drops}
    ports = sorted({port for what in whats for port in PORTS.get(what, ())})
    match chain.whose:
        case "firewalld":
            return [f"firewall-cmd --zone=virtd --change-interface={bridge}"]
        case "ufw":
            return _ufw(end, ports, bridge)
        case "":
            if chain.family == "legacy":
                return [f"tc filter show dev {bridge} ingress", "bpftool net show"]
            insert = f"nft insert rule {chain.family} {chain.table} {chain.name}"
            return [f"{insert} '{rule}'" for rule in _nft(chain, end, whats, ports, bridge)]
    return _iptables(chain, end, whats, ports, bridge)


def _ufw(end: str, ports: list[int], bridge: str) -> list[str]:
    if end != INPUT:
        return [f"ufw route allow in on {bridge}" + (f" out on {bridge}" if end == BRIDGED else "")]
    return [f"ufw allow in on {bridge} to any port {port}{'' if port == 53 else ' proto udp'}" for port in ports]


def _iptables(chain: Chain, end: str, whats: set[str], ports: list[int], bridge: str) -> list[str]:
    tool = chain.whose if chain.family == "legacy" else "ip6tables" if chain.family == "ip6" else "iptables"
    table = f" -t {chain.table}" if chain.table not in ("", "filter") else ""
    insert = f"{tool}{table} -I {'DOCKER-USER' if chain.whose == 'docker' else chain.name}"
    again = ["virtctl reload"] if chain.family == "legacy" else []  # its changes are told to nobody
    if end == BRIDGED and chain.hook == "forward":
        return [f"{insert} -i {bridge} -o {bridge} -j ACCEPT", *again]
    if chain.hook == "input":
        services = [("udp", port) for port in ports] + ([("tcp", 53)] if 53 in ports else [])
        found = [f"{insert} -i {bridge} -p {protocol} --dport {port} -j ACCEPT" for protocol, port in services]
        found += [f"{insert} -i {bridge} -p ipv6-icmp -j ACCEPT"] if "ICMPv6" in whats else []
        return found + again
    if chain.hook == "forward":
        answers = f"{insert} -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
        return [f"{insert} -i {bridge} -j ACCEPT", answers, *again]
    return [f"{insert} -i {bridge} -j ACCEPT", *again]


def _nft(chain: Chain, end: str, whats: set[str], ports: list[int], bridge: str) -> list[str]:
    from_it = f'iifname "{bridge}"'
    if chain.family == "bridge":
        # By the names of domains' and containers' ports: to ask for the bridge's own not every kernel has.
        return [f'{way} "{mine}" accept' for mine in ("vt-*", "vl*") for way in ("iifname", "oifname")]
    if chain.hook == "input":
        found = [f"{from_it} udp dport {{ {', '.join(map(str, ports))} }} accept"] if ports else []
        found += [f"{from_it} tcp dport 53 accept"] if 53 in ports else []
        return found + ([f"{from_it} meta l4proto ipv6-icmp accept"] if "ICMPv6" in whats else [])
    if chain.hook == "forward" and end == FORWARD:
        return [f"{from_it} accept", f'oifname "{bridge}" ct state related,established accept']
    return [f"{from_it} accept"]
