# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtd.systemd.units on real systemds. The checks themselves are in units_probe.py, which runs inside the lab."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.live.bare_lab import ROOT, BareLab, bare_lab

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.live

PROBE = ROOT / "tests" / "live" / "units_probe.py"
# VIRTD_SUITE asks for another one (forky) instead.
SUITES = [os.environ["VIRTD_SUITE"]] if "VIRTD_SUITE" in os.environ else ["trixie", "bookworm"]
CHECKS = re.findall(r"^async def (check_\w+)", PROBE.read_text(), re.MULTILINE)


@pytest.fixture(scope="module", params=SUITES)
def lab(request: pytest.FixtureRequest) -> Iterator[BareLab]:
    with bare_lab("units", request.param) as lab:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for module in (ROOT / "virtd").rglob("*.py"):
                archive.add(module, str(module.relative_to(ROOT)))
            archive.add(PROBE, PROBE.name)
        lab.run("mkdir", "-p", "/opt/units")
        lab.run("tar", "-x", "-C", "/opt/units", "--no-same-owner", stdin=buffer.getvalue())
        yield lab


@pytest.mark.parametrize("check", CHECKS)
def test_units(lab: BareLab, check: str) -> None:
    try:
        lab.run("python3", "-W", "error", "-W", "ignore::ImportWarning", f"/opt/units/{PROBE.name}", check)
    except subprocess.CalledProcessError as exc:
        if exc.returncode == 77:
            pytest.skip("not possible in this lab")
        raise
