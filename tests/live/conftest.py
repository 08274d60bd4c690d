# SPDX-License-Identifier: LGPL-2.1-or-later
"""One lab for all live tests of a run, with virtd in it; each test begins without domains and with a fresh daemon.

VIRTD_SUITE chooses the lab's suite (trixie by default). VIRTD_KEEP_LAB=1 leaves it running for a look afterwards;
VIRTD_LAB=NAME uses a lab that is up already, as it is.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.harness import Lab, build_rpm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What a test may have left, by commands that say nothing otherwise: units, records, interfaces, pools with their
# mounts and logs, rules. Verdicts of jobs are kept. In one script: to enter the lab for each takes seconds.
LEFT = """
systemctl list-units --all --plain --no-legend 'virtd-*-*.service' 2>&1
ls -d /run/virtd/qemu/* /run/virtd/network/* /var/lib/virtd/network/* /var/log/virtd/storage/* 2>/dev/null
ls /sys/class/net | grep -v '^lo$'
ls /run/virtd/storage | grep -v '^job-'
findmnt -rno TARGET | grep ^/srv/
nft list tables 2>&1
rm -f /var/log/virtd/qemu/* /var/log/virtd/network/*
"""
SUITE = os.environ.get("VIRTD_SUITE", "trixie")
LONG = ("test_survival_table", "test_sweep", "test_model")  # one test each, of minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, then those of many tests: nobody shall be alone with one in the end."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONG, -tests[item.path], item.path))


@pytest.fixture(scope="session")
def packages() -> dict[str, Path]:
    """Two versions of the package, as `make rpm` builds them."""
    return {version: build_rpm(version) for version in ("0.1.0", "0.1.1")}


@pytest.fixture(scope="session")
def booted(request: pytest.FixtureRequest) -> Iterator[Lab]:
    if "VIRTD_LAB" in os.environ:
        yield Lab(os.environ["VIRTD_LAB"])
        return
    packages: dict[str, Path] = request.getfixturevalue("packages")
    name = f"live-{os.getpid()}"
    lab = Lab(name)
    try:
        Lab.up(name, "--suite", SUITE, "--rpm", str(packages["0.1.0"]))
        yield lab
    finally:
        if os.environ.get("VIRTD_KEEP_LAB") != "1":
            lab.down()


@pytest.fixture
def lab(booted: Lab) -> Iterator[Lab]:
    """The lab, and after the test: no domain or network, no slot, no unit and no record of one is left."""
    yield booted
    booted.undefine_all()
    booted.wait("an empty store", lambda: booted.slots() == 0, 10)
    assert booted.sh(LEFT, check=False) == ""
