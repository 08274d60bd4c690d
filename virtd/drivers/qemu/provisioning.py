# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest's system is given for its first boot, as files in the guest's own directory in /run.

They are copies, made at each start: the files that the definition names may change, or be removed, while the guest
runs. They belong to root, and the guest's group may read them: a QEMU that its guest has taken over can't write to
them. The directory is removed with all that is in it when the guest has ended.
"""

from __future__ import annotations

import base64
import os
import re
import struct
from typing import TYPE_CHECKING

import msgspec

from ... import errors, files, reach, untrusted
from ...model.provisioning import HOSTNAME
from . import directory, iso9660

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...model.domain import Domain

LABEL = "cidata"  # by which cloud-init finds the volume
LIMIT = 1 << 20  # of each file that the definition names
CREDENTIALS_LIMIT = 24 << 10  # of all credentials: with SMBIOS 2 all tables together have at most 64 KiB
OEM_STRINGS, HANDLE = 11, 0xE00  # the type of an SMBIOS structure, and the number that QEMU itself gives one of it


def contents(domain: Domain, uuid: str, source: str) -> dict[str, bytes]:
    """The files by name; none if the definition has nothing for the guest's system. Raises InvalidDefinition."""
    found = {}
    if domain.guest.by_cloud_init:
        found[directory.SEED] = iso9660.image(LABEL, _for_cloud_init(domain, uuid, source))
    if domain.guest.credentials:
        found[directory.SMBIOS] = oem_strings(_credentials(domain, source))
    if domain.guest.ignition is not None:
        found[directory.IGNITION] = _read(domain.guest.ignition, source, "guest.ignition")
    return found


def write(runtime: str, found: Mapping[str, bytes], group: int) -> None:
    """Write the files for a guest of that group. Raises OSError or HostError."""
    if not found:
        return
    place = directory.provided(runtime)
    files.make_directory(place, 0o750)
    os.chown(place, -1, group)
    for name, content in found.items():
        files.write(f"{place}/{name}", content, mode=0o440, group=group, sync_directory=False)


def _for_cloud_init(domain: Domain, uuid: str, source: str) -> dict[str, bytes]:
    """The files of its data source NoCloud, which requires the first two.

    The keys are in the meta-data, where they don't have to be merged with somebody's user-data.
    """
    guest = domain.guest
    found = {"meta-data": _meta_data(domain, uuid), "user-data": b"#cloud-config\n"}
    if guest.user_data is not None:
        found["user-data"] = _read(guest.user_data, source, "guest.user_data")
    if guest.network_config is not None:
        found["network-config"] = _read(guest.network_config, source, "guest.network_config")
    return found


def _meta_data(domain: Domain, uuid: str) -> bytes:
    """YAML, each text in it as in JSON. cloud-init does all of its work again once the instance has another id."""
    guest = domain.guest
    hostname = guest.hostname or (domain.name if re.fullmatch(HOSTNAME, domain.name) else "")
    lines = [f"instance-id: {_quoted(uuid)}"]
    if hostname:
        lines += [f"local-hostname: {_quoted(hostname)}"]
    if guest.ssh_keys:
        lines += ["public-keys:", *(f"- {_quoted(key)}" for key in guest.ssh_keys)]
    return "".join(f"{line}\n" for line in lines).encode()


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _credentials(domain: Domain, source: str) -> list[bytes]:
    """As systemd takes them (smbios-type-11(7)): in Base64, so that they may have any content."""
    found, size = [], 0
    for name, path in domain.guest.credentials.items():
        content = _read(path, source, f"guest.credentials.{name}")
        if (size := size + len(content)) > CREDENTIALS_LIMIT:
            expected = f"expected at most {CREDENTIALS_LIMIT >> 10} KiB in all credentials together"
            raise errors.InvalidDefinition(source, "guest.credentials", expected)
        found.append(f"io.systemd.credential.binary:{name}=".encode() + base64.b64encode(content))
    return found


def oem_strings(strings: Sequence[bytes]) -> bytes:
    """A whole SMBIOS structure (DSP0134, 6.1 and 7.12), of at most 255 strings.

    QEMU before 10.0 doesn't end a string that it reads from a file by itself (-smbios type=11,path=): what follows in
    its memory would be added.
    """
    head = struct.pack("<BBHB", OEM_STRINGS, 5, HANDLE, len(strings))
    return head + b"".join(string + b"\0" for string in strings) + b"\0"


def _read(path: str, source: str, key: str) -> bytes:
    """The content of a file that nobody but root could exchange."""
    try:
        with reach.reached(path) as file:
            return untrusted.read(file.itself, LIMIT, follow=True)
    except errors.HostError as exc:
        raise errors.InvalidDefinition(source, key, exc.message, hint=exc.hint) from exc
    except OSError as exc:
        raise errors.InvalidDefinition(source, key, f"{path} can't be read: {exc.strerror}") from exc
