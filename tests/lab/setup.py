# SPDX-License-Identifier: LGPL-2.1-or-later
"""Installs on the host what labs need, by the host's own package manager, and only what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from .say import say
from .state import LabError

# Program: its package on Debian and its kin, and on Fedora and its kin.
_NEEDS = {
    "mmdebstrap": ("mmdebstrap", "mmdebstrap"),
    "systemd-nspawn": ("systemd-container", "systemd-container"),
    "rpm": ("rpm", "rpm"),
    "rpmbuild": ("rpm", "rpm-build"),
    "apt-get": ("apt", "apt"),
    "cc": ("gcc", "gcc"),
    "nsenter": ("util-linux", "util-linux-core"),
    "mount": ("mount", "util-linux-core"),
    "make": ("make", "make"),
    "git": ("git", "git-core"),
    "xz": ("xz-utils", "xz"),
}


def missing() -> list[str]:
    """The programs that aren't on the host, "pip" if Python has none, and the archive keys if they aren't there."""
    away = [program for program in _NEEDS if shutil.which(program) is None]
    # Asked of a new process, because the lab's own Python runs without site-packages.
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode != 0:
        away.append("pip")
    if not os.path.isdir("/usr/share/keyrings") or not any(
        name.startswith("debian-archive-") for name in os.listdir("/usr/share/keyrings")
    ):
        away.append("debian-archive-keyring")
    return away


def install() -> None:
    """Installs what is missing. Raises LabError if there is no package manager that it knows, or that fails."""
    away = missing()
    if not away:
        say("the host has all that labs need")
        return
    if shutil.which("apt-get") and shutil.which("dpkg"):
        extra = {"pip": "python3-pip", "debian-archive-keyring": "debian-archive-keyring"}
        packages = sorted({extra.get(name) or _NEEDS[name][0] for name in away})
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        calls = [["apt-get", "update"], ["apt-get", "install", "--yes", "--no-install-recommends", *packages]]
    elif shutil.which("dnf"):
        extra = {"pip": "python3-pip", "debian-archive-keyring": "debian-keyring"}
        packages = sorted({extra.get(name) or _NEEDS[name][1] for name in away})
        environment = dict(os.environ)
        calls = [["dnf", "install", "--assumeyes", "--setopt=install_weak_deps=False", *packages]]
    else:
        raise LabError(f"this host has neither apt-get nor dnf; install by hand: {', '.join(away)}")
    say(f"the host lacks {', '.join(away)}: installing {', '.join(packages)}")
    for argv in calls:
        done = subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode != 0 and argv[1] != "update":
            raise LabError(f"{' '.join(argv)} failed:\n{done.stdout.decode(errors='replace')[-3000:]}")
    still = missing()
    if still:
        raise LabError(f"still missing after the installation: {', '.join(still)}")
    say("the host has all that labs need now")
