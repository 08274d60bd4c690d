# SPDX-License-Identifier: LGPL-2.1-or-later
"""A local user who exchanges files in her own directories while root's daemon gives them away, shows or reads them.

What she goes for is the host's /etc/shadow and the disk of somebody else's guest: neither may change hands, and
nothing of them may get into a guest or a volume of hers.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from tests.live.test_disks import kernel_domain
from tests.live.test_storage import define, forget_pools

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Lab

pytestmark = pytest.mark.live

MALLORY = 1666
HOME = "/srv/mallory"
VICTIM = "/srv/victim/disk.raw"
SECRET = "/etc/shadow"

# Exchanges PATH for each of the ways, over and over: her own file, links to what isn't hers, a directory.
SWAPPER = """
import os, sys
path, real, *targets = sys.argv[1:]
way = 0
while True:
    way += 1
    new = f"{path}.{way % 2}"
    try:
        if way % 2:
            os.link(real, new)
        else:
            os.symlink(targets[way // 2 % len(targets)], new)
        os.rename(new, path)
    except OSError:
        try:
            os.unlink(new)
        except OSError:
            pass
"""


@pytest.fixture
def mallory(lab: Lab) -> Iterator[str]:
    """Her directory, with a disk of hers in it; and somebody else's guest, which runs."""
    lab.write("/srv/swapper.py", SWAPPER)
    lab.sh(
        f"chmod 644 /srv/swapper.py; mkdir -p {HOME}/way /srv/victim; truncate -s 1M {HOME}/own.raw {VICTIM}; "
        f"ln {HOME}/own.raw {HOME}/disk.raw; ln {HOME}/own.raw {HOME}/way/disk.raw; "
        f"chmod 600 {HOME}/*.raw {VICTIM}; chown -R {MALLORY} {HOME}"
    )
    kernel_domain(lab, "victim", f'[[disk]]\npath = "{VICTIM}"\n')
    lab.virtdctl("start", "victim")
    before = owners(lab)
    try:
        yield HOME
        assert owners(lab) == before, "what wasn't hers has changed hands"
    finally:
        lab.undefine_all()
        lab.sh(f"rm -rf {HOME} /srv/victim /srv/swapper.py /srv/root /tmp/mallory")


def owners(lab: Lab) -> str:
    return lab.sh(f"stat -c '%n %u:%g %a' {SECRET} {VICTIM}")


@contextlib.contextmanager
def swapping(lab: Lab, path: str, *targets: str) -> Iterator[None]:
    words = " ".join((path, f"{HOME}/own.raw", *targets))
    lab.sh(
        f"systemd-run -q --collect --unit=mallory setpriv --reuid {MALLORY} --clear-groups "
        f"python3 /srv/swapper.py {words}"
    )
    try:
        yield
    finally:
        lab.sh("systemctl stop mallory")


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("disk", f"{HOME}/disk.raw"),
        ("disk", f"{HOME}/way/disk.raw"),
        ("disk", "/srv/root/link.raw"),
        ("cdrom", f"{HOME}/disk.raw"),
    ],
)
def test_swapped_before_the_start(lab: Lab, mallory: str, key: str, path: str) -> None:
    """Whatever the moment that the start looks at it, also where only a link of root's leads there."""
    lab.sh(f"mkdir -p /srv/root; ln -sfn {mallory}/disk.raw /srv/root/link.raw")
    kernel_domain(lab, "hers", f'[[{key}]]\npath = "{path}"\n')
    swapped = f"{mallory}/way" if "/way/" in path else f"{mallory}/disk.raw"
    if "/way/" in path:
        lab.sh(f"mv {mallory}/way {mallory}/real; ln -s real {mallory}/way; ln -s {SECRET} {mallory}/disk.raw -f")
    with swapping(lab, swapped, *((mallory, "/srv/victim") if "/way/" in path else (SECRET, VICTIM))):
        for _ in range(5):
            refused = lab.virtdctl("start", "hers", check=False)
            assert refused.returncode == 1, lab.sh(f"stat {SECRET}")
            assert "could replace" in refused.stderr or "no such file" in refused.stderr, refused.stderr
            assert lab.info("hers")["state"] == "stopped"
    assert "chown root" in refused.stderr or "no such file" in refused.stderr


@pytest.mark.parametrize("record", ["new", "old"])
def test_swapped_while_it_runs(lab: Lab, mallory: str, record: str) -> None:
    """A guest that an older virtd has started, or whose disk's directory was given to her meanwhile."""
    kernel_domain(lab, "hers", f'[[disk]]\npath = "{mallory}/disk.raw"\n')
    for _ in range(3):
        lab.sh(
            f"chown -R root {mallory}; chown {MALLORY} {mallory}/own.raw; ln -f {mallory}/own.raw {mallory}/disk.raw"
        )
        lab.virtdctl("start", "hers")
        assert lab.sh(f"stat -c %u {mallory}/disk.raw").strip() not in ("0", str(MALLORY))
        if record == "old":
            rewrite(lab, "hers", mallory)
        lab.sh(f"chown {MALLORY} {mallory}")
        with swapping(lab, f"{mallory}/disk.raw", VICTIM, SECRET, VICTIM):
            lab.virtdctl("stop", "hers")
        # The file that it was is hers again when its name led there, and the guest's user's otherwise.
        assert lab.sh(f"stat -c %u {mallory}/own.raw").strip() != "0"
        assert lab.info("victim")["state"] == "running"


def rewrite(lab: Lab, name: str, where: str) -> None:
    """Have the record as virtd had it before it knew which file it was: path and owner."""
    path = f"/run/virtd/qemu/{name}.json"
    lab.sh("systemctl kill -s STOP virtd.service")
    found = json.loads(lab.sh(f"cat {path}"))
    given = found["data"].pop("given")
    assert len(given) == 1
    found["data"]["owners"] = [[f"{where}/disk.raw", MALLORY, 0]]
    lab.write(path, json.dumps(found))
    lab.sh(f"chmod 600 {path}; systemctl kill -s KILL virtd.service")
    lab.wait("the next daemon", lambda: lab.virtdctl("list", check=False).returncode == 0, 20)


def test_a_sticky_directory(lab: Lab, mallory: str) -> None:
    """In /tmp she can't exchange what is root's; but links of hers lead nowhere."""
    kernel_domain(lab, "mine", '[[disk]]\npath = "/tmp/mine.raw"\n')
    kernel_domain(lab, "hers", '[[disk]]\npath = "/tmp/hers.raw"\n')
    lab.sh(f"truncate -s 1M /tmp/mine.raw; setpriv --reuid {MALLORY} ln -s {SECRET} /tmp/hers.raw")
    try:
        with swapping(lab, "/tmp/mine.raw", SECRET):
            for _ in range(2):
                lab.virtdctl("start", "mine")
                lab.virtdctl("stop", "mine")
        assert lab.sh("stat -c '%u %F' /tmp/mine.raw").strip() == "0 regular file"
        assert "could replace" in lab.virtdctl("start", "hers", check=False).stderr
    finally:
        lab.sh("rm -f /tmp/mine.raw* /tmp/hers.raw")
    assert mallory


def test_an_import_from_her_directory(lab: Lab, mallory: str) -> None:
    """Her own image may be imported from there; nothing else by her path."""
    lab.sh("rm -rf /srv/pool; mkdir -p /srv/pool")
    define(lab, 'name = "default"\npath = "/srv/pool"\n')
    lab.virtdctl("pool", "start", "default")
    lab.sh(f"head -c 65536 /dev/zero | tr '\\0' m >{mallory}/own.raw")
    done = 0
    try:
        with swapping(lab, f"{mallory}/disk.raw", SECRET, VICTIM):
            for number in range(12):
                ran = lab.virtdctl(
                    "volume", "import", "default", f"v{number}", f"{mallory}/disk.raw", "--from", "raw", check=False
                )
                if ran.returncode == 0:
                    done += 1
                    assert lab.sh(f"tr -d m </srv/pool/v{number} | wc -c").strip() == "0", "somebody else's bytes"
                else:
                    assert "belongs to user" in ran.stderr, ran.stderr
        assert 0 < done < 12, "both were tried"
    finally:
        forget_pools(lab)
        lab.sh("rm -rf /srv/pool")
