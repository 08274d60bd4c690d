# SPDX-License-Identifier: LGPL-2.1-or-later
"""An RPM that says, in Fedora's names, what the root has from Debian, so that virtd's dependencies are checked.

A name is provided only if the Debian package that stands for it is installed, so a root that lacks something fails
the installation of virtd's RPM as a real system would.
"""

from __future__ import annotations

import os
from pathlib import Path

from .say import in_root, run

# Fedora's name: the Debian package that holds the same. Debian's own names are provided as well.
_FEDORA = {
    "python3-libs": "libpython3-stdlib",
    "python3-gobject-base": "python3-gi",
    "python3-gobject": "python3-gi",
    "qemu-system-x86-core": "qemu-system-x86",
    "qemu-kvm-core": "qemu-system-x86",
    "qemu-kvm": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "dbus-daemon": "dbus",
    "dbus-common": "dbus",
    "dnsmasq": "dnsmasq-base",
    "iproute": "iproute2",
    "shadow-utils": "passwd",
    "util-linux-core": "util-linux",
    "systemd-libs": "libsystemd0",
    "filesystem": "base-files",
    "glibc": "libc6",
    "procps-ng": "procps",
    "seabios-bin": "seabios",
}

_SPEC = """\
Name: virtd-lab-debian
Version: 1
Release: 1
Summary: Names of what this Debian root has
License: LGPL-2.1-or-later
BuildArch: noarch
{provides}

%description
Holds no file: it only names what Debian's packages installed.

%files
"""


def install(root: Path, scratch: Path, log: Path) -> None:
    """Builds the package in the root and installs it there, into an RPM database that Debian's rpm then uses."""
    macros = root / "etc/rpm/macros.virtd-lab"
    macros.parent.mkdir(parents=True, exist_ok=True)
    # Debian's rpm keeps its database in the home directory and refuses to install: this machine is one of rpm's.
    macros.write_text("%_dbpath /var/lib/rpm\n")
    spec = scratch / "virtd-lab-debian.spec"
    spec.write_text(_SPEC.format(provides="\n".join(f"Provides: {what}" for what in _provides(root, log))))
    inside = f"/{scratch.relative_to(root)}"
    define = ["--define", f"_topdir {inside}/rpmbuild", "--quiet"]
    run(in_root(root, ["rpmbuild", "-bb", *define, f"{inside}/{spec.name}"]), what="building the RPM stubs", log=log)
    made = next((scratch / "rpmbuild/RPMS").rglob("*.rpm"))
    package = f"/{made.relative_to(root)}"
    run(in_root(root, ["rpm", "--initdb"]), what="making the RPM database", log=log)
    run(in_root(root, ["rpm", "--install", package]), what="installing the RPM stubs", log=log)


def _provides(root: Path, log: Path) -> list[str]:
    listing = ["dpkg-query", "--show", "--showformat=${Package} ${Version}\n"]
    rows = [line.split() for line in run(in_root(root, [*listing]), what="listing the packages").splitlines()]
    # An RPM version has no ~ or + in the places where Debian's have them; virtd asks for upstream versions only.
    versions = {name: version.rpartition(":")[2].partition("-")[0].partition("+")[0] for name, version in rows}
    provided = {f"{name} = {version}" for name, version in versions.items() if _plain(version)}
    for name, debian in _FEDORA.items():
        if debian in versions and _plain(versions[debian]):
            provided.add(f"{name} = {versions[debian]}")
    for directory in ("usr/bin", "usr/sbin"):
        for name in os.listdir(root / directory):
            provided.add(f"/{directory}/{name}")
            provided.add(f"/{directory.removeprefix('usr/')}/{name}")
    for path in root.glob("usr/local/lib/python3*/dist-packages/*.dist-info"):
        name, _, version = path.name.removesuffix(".dist-info").partition("-")
        # qemu_qmp is Fedora's python3-qemu-qmp.
        provided.add(f"python3-{name.replace('_', '-').lower()} = {version}")
    python = next(path.name for path in sorted(root.glob("usr/lib/python3.*")))
    provided.add(f"python(abi) = {python.removeprefix('python')}")
    return sorted(what for what in provided if " " not in what.partition(" = ")[0])


def _plain(version: str) -> bool:
    return bool(version) and all(letter.isalnum() or letter in "._~^" for letter in version)
