# SPDX-License-Identifier: LGPL-2.1-or-later
"""A dbus-daemon of the test's own."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = """<busconfig>
<type>session</type>
<listen>unix:path={directory}/socket</listen>
<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy>
</busconfig>
"""


class PrivateBus(NamedTuple):
    address: str
    process: subprocess.Popen[str]


@contextlib.contextmanager
def private_bus() -> Iterator[PrivateBus]:
    with tempfile.TemporaryDirectory(prefix="virtd-bus-") as directory:
        config = Path(directory, "bus.conf")
        config.write_text(CONFIG.format(directory=directory))
        command = ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert process.stdout is not None
                # Printed once it listens.
                yield PrivateBus(process.stdout.readline().strip(), process)
            finally:
                process.kill()
