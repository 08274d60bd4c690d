# SPDX-License-Identifier: LGPL-2.1-or-later
"""The [guest] table: what a guest's own system is set up with, by cloud-init, systemd's credentials or Ignition.

Secrets are in files that it names: everybody may read a definition.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from .document import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .. import errors

    Refuse = Callable[[str, str], errors.InvalidDefinition]

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOSTNAME = rf"(?=.{{1,64}}\Z){_LABEL}(?:\.{_LABEL})*"  # hostname(7); Linux has at most 64 characters
KEYS_MAX = 256
KEY_MAX = 16 << 10  # sshd(8) ignores longer lines
# What systemd allows (systemd.exec(5)), less blanks and "=", which would end it in an SMBIOS string.
CREDENTIAL = r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}"
CREDENTIALS_MAX = 64
_KEY = r"(?P<kind>[a-z0-9][a-z0-9@.-]*) (?P<blob>[A-Za-z0-9+/]+={0,2})(?: [^\x00-\x1f\x7f]*)?"


class Provisioning(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the guest's system is given.

    `user_data` and `network_config` are paths of cloud-init's files, `ignition` is that of Ignition's, and
    `credentials` has the path of each credential by its name.
    """

    hostname: str | None = None
    ssh_keys: tuple[str, ...] = ()
    user_data: str | None = None
    network_config: str | None = None
    credentials: dict[str, str] = {}
    ignition: str | None = None

    @property
    def by_cloud_init(self) -> bool:
        """Whether there is anything for cloud-init."""
        return bool(self.hostname or self.ssh_keys or self.user_data or self.network_config)

    @property
    def is_empty(self) -> bool:
        return self == Provisioning()

    def paths(self) -> Iterator[tuple[str, str]]:
        """The host's files that it names, each with its key."""
        for key, path in (
            ("user_data", self.user_data),
            ("network_config", self.network_config),
            *((f"credentials.{name}", path) for name, path in self.credentials.items()),
            ("ignition", self.ignition),
        ):
            if path is not None:
                yield f"guest.{key}", path


def check(guest: Provisioning, refuse: Refuse) -> None:
    """Everything that a type can't say, but for the paths. Raises what `refuse(key, expected)` returns."""
    if guest.hostname is not None and not re.fullmatch(HOSTNAME, guest.hostname):
        raise refuse("guest.hostname", f'expected a host name such as "web1", got {shown(guest.hostname)}')
    if len(guest.ssh_keys) > KEYS_MAX:
        raise refuse("guest.ssh_keys", f"expected at most {KEYS_MAX} keys, got {len(guest.ssh_keys)}")
    for index, key in enumerate(guest.ssh_keys):
        if not _is_public_key(key):
            # It isn't shown, for it may be a private one.
            expected = 'expected a public key in one line, such as "ssh-ed25519 AAAAC3Nza... me@example.org"'
            raise refuse(f"guest.ssh_keys[{index}]", expected)
    if guest.ignition is not None and guest.by_cloud_init:
        raise refuse(
            "guest.ignition", "expected no keys for cloud-init with it: a system is set up by one of the two"
        )
    if len(guest.credentials) > CREDENTIALS_MAX:
        raise refuse("guest.credentials", f"expected at most {CREDENTIALS_MAX}, got {len(guest.credentials)}")
    for name, path in guest.credentials.items():
        if not re.fullmatch(CREDENTIAL, name):
            expected = f"expected a name of letters, digits, '_', '.', '@' and '-', got {shown(name)}"
            raise refuse("guest.credentials", expected)
        if not path.startswith("/"):
            # It isn't shown either: it looks like the secret itself.
            expected = "expected the absolute path of a file that has it: everybody may read a definition"
            raise refuse(f"guest.credentials.{name}", expected)


def _is_public_key(text: str) -> bool:
    """Whether it is as sshd(8) has it in authorized_keys, without options. The key itself repeats its type."""
    found = re.fullmatch(_KEY, text) if len(text) <= KEY_MAX else None
    if found is None:
        return False
    import base64  # no start of the daemon needs it

    try:
        blob = base64.b64decode(found["blob"], validate=True)
    except ValueError:  # binascii.Error
        return False
    kind = found["kind"].encode()
    return blob.startswith(len(kind).to_bytes(4, "big") + kind)
