# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds and reports other parties' firewall rules that block a network's guests.

A packet has to pass everybody's rules at each hook on its path; no rule of ours can overrule another's drop. Changing
their rules isn't our business: the report names the chain, and the commands that make it accept what guests need.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from ...children import programs
from ...hints import joined
from ...objects.protocol import Problem
from . import firewall, hints, prerequisites, trials
from .hints import Chain
from .probe import BRIDGED, FORWARD, INPUT, LEGACY, RESOLVED, Probe

if TYPE_CHECKING:
    from collections.abc import Iterable
    from threading import Event

    from .ports import Ground
    from .probe import Lost, Trial
    from .trace import Step

NOTRACK = re.compile(r"\bnotrack\b|xt target \"(CT|NOTRACK)\"")
CONNTRACK = -200  # NF_IP_PRI_CONNTRACK, linux/netfilter_ipv4.h
BUILT_IN = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}  # of iptables, legacy or nft


class Drop(NamedTuple):
    """Where one trial's packet was dropped. `rule`: as nft lists it, "" for the chain's policy; `within`: the chain
    that contains the rule (`chain` is the base chain). `untracked`: nothing dropped it, but its connection isn't
    tracked, and without that there is no NAT.
    """

    chain: Chain
    rule: str
    within: str
    trial: Trial
    untracked: bool = False


class Obstacle(NamedTuple):
    """A problem with its remedy. `unheard`: the kernel doesn't announce when it ends, so it has to be polled."""

    problem: Problem
    unheard: bool


def find(ground: Ground, over: Event) -> list[Obstacle]:
    """Try what guests of an active network do, and return what blocks them; this takes tens of milliseconds, or about
    a second if much is dropped.

    Raises HostError or OSError if trying is impossible, and OSError once `over` is set.
    """
    tried = trials.of(ground)
    if not tried:
        return []
    with Probe(ground.network.bridge_name, tried, over) as probe:
        lost = probe.lost()
        return judged(lost, firewall.chains(), ground.network.bridge_name) if lost else []


def judged(lost: Iterable[Lost], chains: list[dict[str, Any]], bridge: str) -> list[Obstacle]:
    """Assign lost packets to the chains that dropped them. `chains`: all chains on the host, see firewall.py. Raises
    NftError.
    """
    groups: dict[tuple[Chain, str, bool], list[Drop]] = {}
    for one in lost:
        if (drop := _blame(one, chains)) is not None:
            end = INPUT if drop.trial.end == RESOLVED else drop.trial.end
            groups.setdefault((drop.chain, end, drop.untracked), []).append(drop)
    for (_chain, end, _), mine in groups.items():
        # Whatever lets packets out also lets the answers in.
        out = {one.trial.version for one in mine if end == FORWARD and not one.trial.via}
        mine[:] = [one for one in mine if one.trial.connection is None or one.trial.version not in out]
    return [
        Obstacle(_problem(chain, end, mine, bridge), chain.family == "legacy" or end == BRIDGED)
        for (chain, end, _), mine in groups.items()
    ]


def _blame(lost: Lost, chains: list[dict[str, Any]]) -> Drop | None:
    """The drop behind a lost packet; None if no other party's firewall is known to be at fault."""
    dropped = next((step for step in lost.steps if step.verdict == "drop"), None)
    if dropped is None:
        return _untracking(lost, chains) or (None if lost.untracked else _not_nftables(lost))
    if firewall.is_ours(dropped.table):
        return None
    return _by(dropped, lost, chains)


def _by(dropped: Step, lost: Lost, chains: list[dict[str, Any]]) -> Drop:
    family, table, base = dropped.family, dropped.table, _base(dropped, lost.steps)
    mine = {one["name"]: one for one in chains if (one["family"], one["table"]) == (family, table)}
    itself = mine.get(base, {})
    hook = itself.get("hook", "")
    early = hook == "prerouting" and itself.get("prio", 0) <= CONNTRACK
    rule = firewall.rule(family, table, dropped.chain, dropped.handle) if dropped.handle else ""
    chain = Chain(family, table, base, hook, _whose(dropped, hook, mine), early)
    return Drop(chain, rule, dropped.chain, lost.trial)


def _untracking(lost: Lost, chains: list[dict[str, Any]]) -> Drop | None:
    """By whom its connection isn't tracked: a rule with "notrack"."""
    for step in lost.steps:
        if step.handle and step.verdict == "continue":
            drop = _by(step, lost, chains)
            if NOTRACK.search(drop.rule):
                return drop._replace(untracked=True)
    four = lost.trial.version == 4
    if lost.untracked and "raw" in prerequisites.legacy_tables("ip_tables_names" if four else "ip6_tables_names"):
        whose = "iptables-legacy" if four else "ip6tables-legacy"
        return Drop(
            Chain("legacy", "raw", "PREROUTING", "prerouting", whose, early=True), "", "", lost.trial, untracked=True
        )
    return None


def _whose(dropped: Step, hook: str, chains: Iterable[str]) -> str:
    """The tool that a dropping table belongs to, recognised by the names of its `chains`; "" if unknown, or if the
    tool needed to change it isn't installed.
    """
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
    return "iptables" if len(names & BUILT_IN) > 1 else ""  # iptables always creates several of a table's chains


def _base(dropped: Step, steps: tuple[Step, ...]) -> str:
    """The base chain from which the packet reached the chain that dropped it."""
    chain = dropped.chain
    for step in reversed(steps[: steps.index(dropped)]):
        if (step.family, step.table, step.target) == (dropped.family, dropped.table, chain):
            chain = step.chain
    return chain


def _not_nftables(lost: Lost) -> Drop | None:
    if not lost.hook or lost.through:
        return None  # lost for another reason, such as a missing route
    four = lost.trial.version == 4
    there = prerequisites.legacy_tables("ip_tables_names" if four else "ip6_tables_names")
    left = [name for name, (_, hooks) in LEGACY.items() if lost.hook in hooks and name not in lost.passed]
    table = next((name for name in left if name in there), "")
    whose = ("iptables-legacy" if four else "ip6tables-legacy") if table else ""
    chain = Chain("legacy", table, lost.hook.upper(), lost.hook, whose, early=table == "raw")
    return Drop(chain, "", "", lost.trial)


def _listed(words: Iterable[str]) -> str:
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} and {last}" if most else last


def _problem(chain: Chain, end: str, drops: list[Drop], bridge: str) -> Problem:
    if end == INPUT:
        what = f"What its guests ask of the host ({_listed(one.trial.what for one in drops)})"
    else:
        what = _listed(one.trial.what for one in drops).replace(" What", " what").replace(", What", ", what")
        what += f" ({_listed(f'IPv{one.trial.version}' for one in drops)})"
    how = "is kept from NAT, for its connections aren't tracked," if drops[0].untracked else "is dropped"
    text = f"{what} {how} by {_named(chain, drops)}"
    if end == BRIDGED and chain.family != "bridge":
        text += ", to which br_netfilter shows what goes over a bridge"
    return Problem(text, joined("; ", hints.commands(chain, [one.trial for one in drops], bridge)))


def _named(chain: Chain, drops: list[Drop]) -> str:
    if chain.family == "legacy":
        if chain.whose:
            where = f" of the table {chain.table}" if chain.table != "filter" else ""
            return f"legacy iptables, in its chain {chain.name}{where}"
        return f"something that is neither nftables nor iptables, at the hook {chain.hook}: a BPF program, say"
    name = f"the chain {chain.family} {chain.table} {chain.name}"
    rules = [f"“{one.rule}”{f' in {one.within}' if one.within != chain.name else ''}" for one in drops if one.rule]
    return f"{name} ({_listed(rules)})" if rules else f"{name}, by its policy"
