# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whoever follows the README and the pages in docs/ sees what stands there, but for numbers and times."""

from __future__ import annotations

import gzip
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.examples import Step, blocks, steps
from tests.harness import LAB, Lab
from tests.lab.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

ROOT = Path(__file__).resolve().parents[2]
IMAGES = "/var/lib/virtd/images"
# What a reader brings along.
BROUGHT = f"""
cd /root
cp /usr/share/virtd-lab/disk.qcow2 debian-13.qcow2
cp /usr/share/virtd-lab/debian.tar.xz deb.tar
qemu-img create -q -f qcow2 -b /etc/shadow -F raw evil.qcow2 1M
head -c 1M /dev/urandom >logs.img
mkdir -p /srv/spool /srv/www
chmod 777 /srv/spool
virtdctl pool define - <<'.'
name = "spool"
path = "/srv/spool"
.
cp /usr/share/virtd-lab/vmlinuz {IMAGES}/try.vmlinuz
cat /usr/share/virtd-lab/initramfs.gz shell.gz >{IMAGES}/try.initrd
"""
LEFT = f"""
for pool in default spool; do virtdctl pool stop $pool; virtdctl pool undefine $pool; done 2>/dev/null
rm -rf {IMAGES}/* {IMAGES}/.virtd /root/* /srv/spool /srv/www /var/lib/virtd/containers/deb
rm -f /var/log/virtd/lxc/deb.* /var/lib/virtd/lxc-ids.json
"""


@pytest.fixture
def reader(lab: Lab, tmp_path: Path) -> Iterator[Lab]:
    archive = Archive()
    archive.file("bin/sh", b"#!/bin/busybox sh\nexec /bin/busybox sh\n", 0o755)
    archive.file("bin/sleep", b'#!/bin/busybox sh\nexec /bin/busybox sleep "$@"\n', 0o755)
    (tmp_path / "shell.gz").write_bytes(gzip.compress(archive.finish()))
    lab.copy(tmp_path / "shell.gz", "/root/shell.gz")
    lab.sh(BROUGHT)
    yield lab
    lab.undefine_all()
    lab.sh(LEFT, check=False)


def page(lab: Lab, name: str) -> list[Step]:
    """What the page has its reader do in a shell; the definitions in it are where the reader has saved them."""
    text = (ROOT / name).read_text()
    for definition in re.findall(r"^```toml\n(.*?)^```", text, re.M | re.S):
        if found := re.search(r'^name = "(.*)"', definition):
            lab.write(f"/root/{found[1]}.toml", definition)
    return [step for block in blocks(text) if re.search("^# ", block, re.M) for step in steps(block)]


def without_numbers(text: str) -> list[str]:
    """The lines as words, with an N for whatever is another one each time."""
    text = re.sub(r"(\d+min )?\d+s ago", "N ago", text)
    lines = (re.sub(r"\b\d[\d.]*[KMGT]?\b", "N", line).split() for line in text.splitlines())
    return [" ".join(words) for words in lines if words and not re.search(": N %$", " ".join(words))]


def follow(lab: Lab, step: Step) -> None:
    said = lab.run("sh", "-c", f"cd /root\nexec 2>&1\n{step.command}", check=False).stdout
    assert without_numbers(said) == without_numbers(step.shown), step.command


def test_the_readme(reader: Lab) -> None:
    """The guest counts on its console while the reader does what the page says, and no number is missing."""
    counting: subprocess.Popen[bytes] | None = None

    def counted(text: bytes) -> list[int]:
        return [int(number) for number in re.findall(rb"^line (\d+)\r?$", text, re.M)]

    try:
        for step in page(reader, "README.md"):
            if step.command.startswith("systemctl stop"):
                before = counted(reader.console("try"))[-1]
                reader.wait("more of the count", lambda n=before: counted(reader.console("try"))[-1] > n + 2, 180)
            if not step.command.startswith("virtdctl console"):
                follow(reader, step)
                continue
            connected, typed, *_lines = step.shown.splitlines()
            assert connected.startswith("Connected to domain try.")
            typed = typed.partition("# ")[2]  # before that is the directory, which not every busybox calls ~
            reader.wait("a prompt", lambda: b" # " in reader.console("try"), 180)
            command = [LAB, "exec", reader.name, "--", *step.command.split()]
            counting = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert counting.stdin
            counting.stdin.write(f"{typed}\n".encode())
            counting.stdin.flush()
            reader.wait("the count", lambda: counted(reader.console("try"))[-1:] >= [2], 180)
        assert counting
        shown = counted(counting.communicate(timeout=60)[0])
    finally:
        if counting and counting.poll() is None:
            counting.terminate()
            counting.communicate()
    assert shown == list(range(1, len(shown) + 1))
    assert len(shown) > 4


@pytest.mark.parametrize("name", ["containers", "networks", "storage"])
def test_a_page(reader: Lab, name: str) -> None:
    if name == "containers":
        reader.virtdctl("network", "define", "default")
    if name == "storage":
        reader.sh(f"rm {IMAGES}/*")
    for step in page(reader, f"docs/{name}.md"):
        if step.command.split()[0] != "mmdebstrap":
            follow(reader, step)
