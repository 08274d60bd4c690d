# SPDX-License-Identifier: LGPL-2.1-or-later
"""Subscriptions to signals: match rules, the accepted senders, and the owners of names."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from .message import DBUS, DBUS_PATH, BusError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Callback = Callable[[str, str, str, tuple[Any, ...]], None]


class Signal(NamedTuple):
    """A subscription; None matches anything."""

    sender: str | None
    interface: str
    member: str | None
    path: str | None
    callback: Callback


class Signals:
    """The subscriptions of one connection. `call(method, signature, *arguments)` calls the bus itself."""

    def __init__(self, call: Callable[..., Awaitable[tuple[Any, ...]]]) -> None:
        self._call = call
        self._signals: list[Signal] = []
        self._matches: dict[str, int] = {}
        self._owners: dict[str, str] = {}
        self._speakers: set[str | None] = {DBUS}  # accepted senders; the worker thread reads it

    def clear(self) -> None:
        self._signals.clear()

    def listens(self, message: Any) -> bool:
        """Whether anybody here may want this signal. Called in GDBus's worker thread."""
        sender = message.get_sender()
        if sender == DBUS and message.get_member() == "NameOwnerChanged":
            # Noted before the loop gets the signal, because the new owner may send others at once.
            name, _, owner = message.get_body().unpack()
            if owner and name in self._owners:
                self._speakers.add(owner)
        return sender in self._speakers or None in self._speakers

    async def subscribe(
        self,
        sender: str | None,
        interface: str,
        member: str | None,
        path: str | None,
        callback: Callback,
        *,
        arg0: str | None = None,
    ) -> Callable[[], Awaitable[None]]:
        """See Bus.subscribe."""
        signal = Signal(sender, interface, member, path, callback)
        if sender is None or sender.startswith(":"):
            self._speakers.add(sender)
        if sender and not sender.startswith(":") and sender != DBUS:
            await self._watch_owner(sender)
        rule = _match(type="signal", sender=sender, interface=interface, member=member, path=path, arg0=arg0)
        await self._add_match(rule)
        self._signals.append(signal)

        async def unsubscribe() -> None:
            if signal in self._signals:
                self._signals.remove(signal)
                self._matches[rule] -= 1
                if self._matches[rule] == 0:
                    del self._matches[rule]
                    with contextlib.suppress(BusError):
                        await self._call("RemoveMatch", "s", rule)

        return unsubscribe

    async def _add_match(self, rule: str) -> None:
        self._matches[rule] = self._matches.get(rule, 0) + 1
        if self._matches[rule] == 1:
            await self._call("AddMatch", "s", rule)

    async def _watch_owner(self, name: str) -> None:
        if name in self._owners:
            return
        self._owners[name] = ""
        rule = _match(type="signal", sender=DBUS, interface=DBUS, member="NameOwnerChanged", path=DBUS_PATH)
        await self._add_match(f"{rule},arg0='{name}'")
        # A name without an owner will be activated; NameOwnerChanged announces that.
        with contextlib.suppress(BusError):
            (owner,) = await self._call("GetNameOwner", "s", name)
            self._owners[name] = self._owners[name] or owner  # a change since then may have been announced first
            self._speakers.add(owner)

    def receive(self, message: Any, unpack: Callable[[Any], tuple[Any, ...]]) -> None:
        """Pass a signal to its subscribers; `unpack` extracts its values, if there are any subscribers."""
        sender, path = message.get_sender(), message.get_path()
        interface, member = message.get_interface(), message.get_member()
        args: tuple[Any, ...] | None = None
        if sender == DBUS and interface == DBUS and member == "NameOwnerChanged":
            args = unpack(message)
            if args[0] in self._owners:
                self._owners[args[0]] = args[2]
        for signal in tuple(self._signals):
            if (
                signal.interface == interface
                and signal.member in (None, member)
                and signal.path in (None, path)
                and (signal.sender is None or sender in (signal.sender, self._owners.get(signal.sender)))
            ):
                if args is None:
                    args = unpack(message)
                signal.callback(path, interface, member, args)


def _match(**keys: str | None) -> str:
    return ",".join(f"{key}='{value}'" for key, value in keys.items() if value is not None)
