# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verdict on a guest's end, from every combination of witnesses that was met or can be thought of."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.guests.test_verdict import documented
from tests.unit.test_untrusted import odd_files
from virtd.drivers.qemu.ends import RULES, TAIL, evidence, judge, read_events, traced
from virtd.guests.verdict import Request, deciding
from virtd.records import stamp
from virtd.systemd.state import UnitState

if TYPE_CHECKING:
    from pathlib import Path

SEEN = "2026-01-01T00:00:00.000000Z"
EXITED_AT = 1_750_000_000.5


def unit(code: int, status: int, result: str = "success") -> UnitState:
    """What systemd says of a process that ended: `code` is CLD_EXITED (1), CLD_KILLED (2) or CLD_DUMPED (3)."""
    return UnitState(
        name="virtd-qemu-web1.service",
        load="loaded",
        active="active",
        sub="exited",
        result=result,
        main_pid=0,
        invocation_id="ab" * 16,
        exec_code=code,
        exec_status=status,
        exited_at=EXITED_AT,
        description="",
    )


def events(*names: str) -> list[dict[str, Any]]:
    """Events by name; "SHUTDOWN:guest-panic" has that reason."""
    found = []
    for name in names:
        name, _, reason = name.partition(":")
        found.append({"event": name, "data": {"reason": reason} if reason else {}})
    return found


EXIT_0, EXIT_1 = unit(1, 0), unit(1, 1)
KILL, SEGV, TERM = unit(2, 9, "signal"), unit(3, 11, "core-dump"), unit(2, 15, "signal")
OOM = unit(2, 9, "oom-kill")
LATE_0 = msgspec.structs.replace(unit(1, 0, "timeout"), active="failed", sub="failed")  # RuntimeMaxSec=
GONE_0 = msgspec.structs.replace(EXIT_0, active="inactive", sub="dead")  # systemd itself has stopped it
SAID = "qemu-system-x86_64: terminating on signal 15 from pid 4711 (systemctl)"
UNSEEN = "qemu-system-x86_64: terminating on signal 2"
OFF = "SHUTDOWN:guest-shutdown"
QUIT = "SHUTDOWN:host-qmp-quit"


EXAMPLES: list[tuple[UnitState | None, list[str], str, str, str, str, str, str | None]] = [
    # By itself
    (EXIT_0, [OFF], "", "", "stopped", "guest-shutdown", "powered off by itself", None),
    (EXIT_0, ["SHUTDOWN:guest-reset"], "", "", "stopped", "guest-shutdown", "rebooted itself", None),
    (None, [OFF], "", "", "stopped", "guest-shutdown", "powered off by itself", None),
    (EXIT_0, ["STOP", "RESUME", OFF], "", "", "stopped", "guest-shutdown", "powered off by itself", None),
    # The power button
    (EXIT_0, ["POWERDOWN", OFF], "shutdown", "", "stopped", "shutdown", "shut down by ann", "ann"),
    (None, ["POWERDOWN", OFF], "shutdown", "", "stopped", "shutdown", "shut down by ann", "ann"),
    (EXIT_0, ["POWERDOWN", OFF], "", "", "stopped", "host-shutdown", "shut down with the host", None),
    (EXIT_0, ["POWERDOWN", OFF], "reboot given up", "", "stopped", "guest-shutdown", "powered off", None),
    (
        EXIT_0, ["POWERDOWN", OFF], "shutdown given up", "",
        "stopped", "guest-shutdown", "powered off after the shutdown that ann asked for had timed out", None,
    ),
    (KILL, ["POWERDOWN"], "shutdown given up", "", "crashed", "killed", "killed by SIGKILL", None),
    # The button was pressed in another life of the guest.
    (EXIT_0, ["POWERDOWN", OFF, "RESET", "RESUME", OFF], "", "", "stopped", "guest-shutdown", "powered", None),
    # Stopped
    (EXIT_0, ["SHUTDOWN:host-qmp-quit"], "stop", "", "stopped", "stop", "stopped by ann", "ann"),
    (KILL, [], "stop", "", "stopped", "stop", "stopped by ann", "ann"),
    (TERM, [], "stop", "", "stopped", "stop", "stopped by ann", "ann"),
    (EXIT_0, ["SHUTDOWN:host-signal"], "stop", SAID, "stopped", "stop", "stopped by ann", "ann"),
    (None, [], "stop", "", "stopped", "stop", "stopped by ann", "ann"),
    (SEGV, ["SHUTDOWN:host-qmp-quit"], "stop", "", "crashed", "killed", "killed by SIGSEGV", None),
    # Killed
    (KILL, [], "", "", "crashed", "killed", "killed by SIGKILL", None),
    (SEGV, [], "", "", "crashed", "killed", "killed by SIGSEGV", None),
    (KILL, [], "kill", "", "crashed", "killed", "killed by ann", "ann"),
    (KILL, ["POWERDOWN"], "shutdown", "", "crashed", "killed", "killed by SIGKILL", None),
    (EXIT_0, ["SHUTDOWN:host-signal"], "kill", SAID, "crashed", "killed", "killed by ann", "ann"),
    (
        EXIT_0, ["SHUTDOWN:host-signal"], "", SAID,
        "crashed", "killed", "killed by SIGTERM from systemctl (PID 4711)", None,
    ),
    (EXIT_0, ["SHUTDOWN:host-signal"], "", "", "crashed", "killed", "killed by SIGTERM", None),
    # In a PID namespace of its own it doesn't see who did it.
    (EXIT_0, ["SHUTDOWN:host-signal"], "", UNSEEN, "crashed", "killed", "killed by SIGINT", None),
    (unit(2, 64, "signal"), [], "", "", "crashed", "killed", "killed by SIGRTMAX", None),
    # A signal that was asked for, and did nothing; the end came later.
    (EXIT_0, [OFF], "kill", "", "stopped", "guest-shutdown", "powered off by itself", None),
    # Out of memory, whatever was asked
    (OOM, [], "", "", "crashed", "oom", "killed: out of memory", None),
    (OOM, [], "stop", "", "crashed", "oom", "killed: out of memory", None),
    # Panic
    (EXIT_1, ["GUEST_PANICKED", "SHUTDOWN:guest-panic"], "", "", "crashed", "panic", "the guest's kernel", None),
    (EXIT_1, ["GUEST_PANICKED"], "", "", "crashed", "panic", "the guest's kernel panicked", None),
    (None, ["GUEST_PANICKED", "SHUTDOWN:guest-panic"], "", "", "crashed", "panic", "the guest's kernel", None),
    (EXIT_1, ["GUEST_PANICKED", "SHUTDOWN:guest-panic"], "shutdown", "", "crashed", "panic", "the guest's", None),
    # It panicked, was reset, and then ended well.
    (EXIT_0, ["GUEST_PANICKED", "STOP", "RESET", OFF], "", "", "stopped", "guest-shutdown", "powered off", None),
    # The host's shutdown, when the guest didn't react to the button
    (EXIT_0, ["POWERDOWN", "SHUTDOWN:host-qmp-quit"], "", "", "stopped", "host-shutdown", "ended through", None),
    # Failures
    (EXIT_1, [], "", "qemu: no memory", "crashed", "failed", "QEMU exited with status 1", None),
    (unit(1, 203), [], "", "", "crashed", "failed", "QEMU exited with status 203", None),
    # Nobody knows
    (None, [], "", "", "crashed", "unknown", "ended, and nobody saw how", None),
    (unit(0, 0), [], "", "", "stopped", "unknown", "ended", None),
    # A QEMU that doesn't tell, and nobody listened
    (EXIT_0, [], "", "", "stopped", "guest-shutdown", "powered off or rebooted by itself", None),
    (EXIT_0, [], "shutdown", "", "stopped", "shutdown", "shut down by ann", "ann"),
    (EXIT_0, [], "stop", "", "stopped", "stop", "stopped by ann", "ann"),
    (EXIT_1, [], "", "", "crashed", "panic", "the guest's kernel panicked", None),
    (EXIT_1, [], "stop", "", "stopped", "stop", "stopped by ann", "ann"),
    (GONE_0, [], "", "", "stopped", "host-shutdown", "shut down with the host", None),
    (LATE_0, [], "", "", "stopped", "host-shutdown", "shut down by systemd: the time", None),
    (LATE_0, ["POWERDOWN", OFF], "", "", "stopped", "host-shutdown", "shut down by systemd: the time", None),
    (LATE_0, ["POWERDOWN", QUIT], "", "", "stopped", "host-shutdown", "shut down by systemd: the time", None),
    (LATE_0, ["POWERDOWN", OFF], "shutdown", "", "stopped", "shutdown", "shut down by ann", "ann"),
]  # fmt: skip


@pytest.mark.parametrize(("unit", "happened", "verb", "words", "state", "cause", "reason", "by"), EXAMPLES)
def test_the_verdict(
    unit: UnitState | None,
    happened: list[str],
    verb: str,
    words: str,
    state: str,
    cause: str,
    reason: str,
    by: str | None,
) -> None:
    request = Request(verb, "ann", "") if verb else None
    end = judge(evidence(unit, events(*happened), request, words, SEEN))
    assert (end.state, end.exit.cause, end.exit.by) == (state, cause, by)
    assert end.reason.startswith(reason)
    # Time and status are the witness's own; without one it is when we noticed.
    assert end.exit.at == (stamp(EXITED_AT) if unit is not None else SEEN)
    assert end.exit.code == (unit.exec_status if unit is not None and unit.exec_code == 1 else None)
    killed = unit is not None and unit.exec_code in (2, 3)
    # QEMU catches some signals and exits with status 0, and says so.
    assert (end.exit.signal is not None) == (killed or "SHUTDOWN:host-signal" in happened)


def test_every_rule_decides_one_of_the_examples() -> None:
    decided = {
        deciding(
            RULES, evidence(unit, events(*happened), Request(verb, "ann", "") if verb else None, words, SEEN)
        ).name
        for unit, happened, verb, words, *_ in EXAMPLES
    }
    names = [rule.name for rule in RULES]
    assert decided == set(names)
    assert len(names) == len(decided)


def test_the_documented_rules_are_those_of_the_code() -> None:
    """In their order, which is part of their meaning."""
    assert documented("machine.md") == [(rule.name, rule.state.value, rule.cause.value) for rule in RULES]


def test_the_signal_that_qemu_caught_is_on_record() -> None:
    end = judge(evidence(EXIT_0, events("SHUTDOWN:host-signal"), None, SAID.replace("15", "2"), SEEN))
    assert (end.exit.signal, end.exit.code) == ("SIGINT", 0)


EVENT = st.fixed_dictionaries(
    {
        "event": st.sampled_from(["SHUTDOWN", "RESET", "POWERDOWN", "GUEST_PANICKED", "STOP"]) | st.text(max_size=5),
        "data": st.dictionaries(st.just("reason"), st.text(max_size=5) | st.none() | st.integers()),
    }
)


@given(
    st.none()
    | st.builds(unit, st.integers(0, 4), st.integers(0, 300), st.sampled_from(["success", "oom-kill", "x"])),
    st.lists(EVENT, max_size=5),
    st.none()
    | st.builds(Request, st.sampled_from(["stop", "kill", "shutdown", "reboot", "?"]), st.text(), st.text()),
    st.text(max_size=50),
)
def test_there_is_always_a_verdict(
    unit: UnitState | None, happened: list[dict[str, Any]], request: Request | None, words: str
) -> None:
    end = judge(evidence(unit, happened, request, words, SEEN))
    assert end.state in ("stopped", "crashed")
    assert end.reason


def test_reading_events(tmp_path: Path) -> None:
    stem = str(tmp_path / "events")
    assert read_events(stem) == []
    lines = [
        {"QMP": {}},
        {"return": {}},
        {"event": "RESUME", "timestamp": {}},
        {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}},
    ]
    text = "".join(json.dumps(line) + "\r\n" for line in lines)
    (tmp_path / "events.out").write_text(text)
    found = read_events(stem)
    assert [event["event"] for event in found] == ["RESUME", "SHUTDOWN"]
    assert found[1]["data"]["reason"] == "guest-shutdown"
    # Killed in the middle of a line.
    (tmp_path / "events.out").write_text(text[:-10])
    assert [event["event"] for event in read_events(stem)] == ["RESUME"]


def test_only_the_end_of_many_events_is_read(tmp_path: Path) -> None:
    line = json.dumps({"event": "RTC_CHANGE", "data": {"offset": 1}}) + "\r\n"
    count = TAIL // len(line) * 3
    (tmp_path / "events.out").write_text(line * count + json.dumps({"event": "SHUTDOWN"}))
    found = read_events(str(tmp_path / "events"))
    assert found[-1]["event"] == "SHUTDOWN"
    assert count // 4 < len(found) < count // 2


@pytest.mark.parametrize(
    "junk", [b"[" * 60_000, b'{"event": 7}', b'{"event": "SHUTDOWN", "data": "x"}', b"\xff\xff", b"7", b'{"event":']
)
def test_a_guest_that_broke_out_writes_what_it_likes(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "events.out").write_bytes(junk + b"\r\n" + b'{"event": "STOP"}\r\n')
    found = read_events(str(tmp_path / "events"))
    assert [event["event"] for event in found] == ["STOP"]
    assert judge(evidence(EXIT_0, found, None, "", SEEN)).state == "stopped"


TRACED = "qemu_system_shutdown_request reason="


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (f"{TRACED}6\n", [OFF]),
        (f"qemu_system_powerdown_request \n{TRACED}6", ["POWERDOWN", OFF]),
        (f"{SAID}\n", ["SHUTDOWN:host-signal"]),
        (f"{UNSEEN}\n", ["SHUTDOWN:host-signal"]),
        (f"{TRACED}6\n{SAID}\n", [OFF, "SHUTDOWN:host-signal"]),
        (f"{TRACED}8\n", ["GUEST_PANICKED", "SHUTDOWN:guest-panic"]),
        (f"{TRACED}7\nqemu: something\n", ["SHUTDOWN:guest-reset"]),
        (f"{TRACED}2\n", ["SHUTDOWN:host-qmp-quit"]),
        # As QEMU up to 7.2 says it
        (f"4711@1795878782.554291:qemu_system_powerdown_request\n4711@1.5:{TRACED}6\n", ["POWERDOWN", OFF]),
        # What was kept and reset was another life.
        (f"qemu_system_powerdown_request\n{TRACED}6\n{TRACED}6\n", [OFF]),
        (f"{TRACED}99\n", ["SHUTDOWN"]),
        (f"x{TRACED}6\n{TRACED}x\n", []),
        ("", []),
    ],
)
def test_what_qemu_says_of_its_end_on_stderr(words: str, found: list[str]) -> None:
    expected = events(*found)
    if found == ["SHUTDOWN"]:
        expected[0]["data"] = {"reason": ""}
    assert traced(words) == expected


def test_whatever_lies_where_the_diary_was_is_no_event(tmp_path: Path) -> None:
    """A FIFO there hung the daemon, and each one that came after it."""
    for kind, path in odd_files(tmp_path).items():
        os.rename(path, path.with_suffix(".out"))
        assert read_events(str(path)) == [], kind
