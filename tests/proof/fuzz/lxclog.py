# SPDX-License-Identifier: LGPL-2.1-or-later
"""LXC's log, which is read as a container's diary, and has words of the container's in it."""

from __future__ import annotations

import msgspec

from virtd.drivers.lxc import ends
from virtd.guests.verdict import Request
from virtd.systemd.state import CLD_EXITED, CLD_KILLED, UnitState

PREFIX = b"lxc-start web1 20261124035119.773 NOTICE   start - ../src/lxc/start.c:post_start:2217 - "
SEEDS = (
    PREFIX + b'Started "/sbin/init" with pid "243"\n' + PREFIX + b"Child <243> ended on signal Killed(9)\n",
    PREFIX + b"'sh' started with pid '578'\n" + PREFIX + b"Child <578> ended on error (3)\n",
    PREFIX.replace(b"NOTICE ", b"ERROR  ") + b"No such file or directory - Failed to open\n",
    # Digits that int() takes for others, or for too many.
    PREFIX
    + 'Started "x" with pid "²４"\n'.encode()
    + PREFIX
    + b"Child <"
    + b"9" * 5000
    + b"> ended on error (9999)\n",
    b"a line of something else\n\xff\xfe\x1b]52;\n",
)
WORDS = (
    PREFIX,
    b"Child <",
    b"> ended on signal (",
    b"> ended on error (",
    b"9" * 4400,
    "１²".encode(),
    b"with pid '",
    b"(" * 99,
)
LIMIT = 20000

ENDS = ((CLD_EXITED, 0, "success"), (CLD_EXITED, 3, "exit-code"), (CLD_KILLED, 9, "oom-kill"))
UNITS = (None, *(
    UnitState(
        name="virtd-lxc-web1.service", load="loaded", active="active", sub="exited", result=result, main_pid=0,
        invocation_id="", exec_code=code, exec_status=status, exited_at=2.0, description="",
    )
    for code, status, result in ENDS
))  # fmt: skip


def target(data: bytes) -> None:
    words = data.decode(errors="replace")
    pid = 0
    for line in words.splitlines():
        said = ends.read(line)
        if (found := ends.started(said.words)) is not None:
            assert 0 <= found < 1 << 32
            pid = found
    ends.errors_in(words)
    for unit in UNITS:
        for verb in ("", "stop", "kill", "shutdown"):
            request = Request(verb, "root", "") if verb else None
            end = ends.judge(
                ends.evidence(unit, words, pid, request, command=bool(verb), host_down=not verb, seen="now")
            )
            msgspec.json.encode(end.exit)
