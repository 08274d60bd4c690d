# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of a unit: whether it runs, how it ended, and why it couldn't be started."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from .. import errors

if TYPE_CHECKING:
    from ..hints import Hint

# What waitid(2) calls the ways to end, as ExecMainCode has them.
CLD_EXITED: Final = 1
CLD_KILLED: Final = 2
CLD_DUMPED: Final = 3

EXIT_GROUP: Final = 216
EXIT_USER: Final = 217
# systemd's exit statuses for failures between fork and exec, systemd.exec(5). {path} is the program.
EXEC_STATUS: Final = {
    200: ("CHDIR", "cannot change to the working directory"),
    202: ("FDS", "cannot set up the file descriptors"),
    203: ("EXEC", "cannot execute {path}: the program is missing or not executable"),
    205: ("LIMITS", "cannot set the resource limits"),
    208: ("STDIN", "cannot set up standard input"),
    209: ("STDOUT", "cannot set up standard output"),
    EXIT_GROUP: ("GROUP", "cannot change to the group"),
    EXIT_USER: ("USER", "cannot change to the user: does it exist?"),
    218: ("CAPABILITIES", "cannot drop capabilities"),
    219: ("CGROUP", "cannot set up the control group"),
    222: ("STDERR", "cannot set up standard error"),
    225: ("NETWORK", "cannot set up the network namespace"),
    226: ("NAMESPACE", "cannot set up the mount namespace: does every path it is to see exist?"),
    227: ("NO_NEW_PRIVILEGES", "cannot disable new privileges"),
    228: ("SECCOMP", "cannot apply the system call filter"),
    229: ("SELINUX_CONTEXT", "cannot set the SELinux context"),
    231: ("APPARMOR_PROFILE", "cannot change to the AppArmor profile"),
    233: ("RUNTIME_DIRECTORY", "cannot set up the runtime directory"),
    238: ("STATE_DIRECTORY", "cannot set up the state directory"),
    240: ("LOGS_DIRECTORY", "cannot set up the log directory"),
    243: ("CREDENTIALS", "cannot set up the credentials"),
}

UNIT_PROPERTIES: Final = ("LoadState", "ActiveState", "SubState", "InvocationID", "Description", "Job")
SERVICE_PROPERTIES: Final = (
    "MainPID",
    "Result",
    "ExecMainCode",
    "ExecMainStatus",
    "ExecMainExitTimestamp",
)


class UnitState(msgspec.Struct, frozen=True):
    """A unit as PID 1 sees it.

    `load`, `active`, `sub` and `result` are systemd's words. `main_pid` is 0 when no process runs. `exec_code` is one
    of CLD_EXITED, CLD_KILLED, CLD_DUMPED, or 0 while the main process runs, and `exec_status` the exit status or the
    signal. Times are seconds since the epoch. `invocation_id` is 32 hex digits, or empty before the first start.
    """

    name: str
    load: str
    active: str
    sub: str
    result: str
    main_pid: int
    invocation_id: str
    exec_code: int
    exec_status: int
    exited_at: float | None
    description: str
    job: int = 0  # of a queued job for the unit

    @property
    def running(self) -> bool:
        """Whether the main process exists, also while the unit is being stopped."""
        return self.main_pid > 0

    @property
    def exit_code(self) -> int | None:
        """The exit status, if the main process has exited by itself."""
        return self.exec_status if self.exec_code == CLD_EXITED else None

    @property
    def killed_by(self) -> str | None:
        """The name of the signal that killed the main process, if any."""
        return signal_name(self.exec_status) if self.exec_code in (CLD_KILLED, CLD_DUMPED) else None

    @property
    def unknown(self) -> bool:
        """Whether the unit failed without saying how its main process ended."""
        return self.exec_code == 0 and self.result not in ("", "success")


class Listed(NamedTuple):
    """One line of `list`, which describes many units in a single call."""

    name: str
    description: str
    load: str
    active: str
    sub: str


class StartFailed(errors.StartFailed):
    """systemd could not start the unit; `state` is that of its remains, to be collected (None: there are none)."""

    def __init__(self, message: str, *, hint: Hint = "", state: UnitState | None = None) -> None:
        super().__init__(message, hint=hint)
        self.state = state


def parse_state(name: str, properties: dict[str, Any]) -> UnitState:
    """A UnitState from the properties of both interfaces."""
    return UnitState(
        name=name,
        load=properties["LoadState"],
        active=properties["ActiveState"],
        sub=properties["SubState"],
        result=properties["Result"],
        main_pid=properties["MainPID"],
        invocation_id=bytes(properties["InvocationID"]).hex(),
        exec_code=properties["ExecMainCode"],
        exec_status=properties["ExecMainStatus"],
        exited_at=_seconds(properties["ExecMainExitTimestamp"]),
        description=properties["Description"],
        job=properties["Job"][0],
    )


def _seconds(microseconds: int) -> float | None:
    return microseconds / 1e6 if microseconds else None


def failure(program: str, job: str, state: UnitState | None) -> str:
    """Why a start failed, in words, from the job's result and the unit's state."""
    if state is None:
        return f"systemd could not start the unit: {job}"
    code = state.exit_code
    if code in EXEC_STATUS:
        word, text = EXEC_STATUS[code]
        return f"{text.format(path=program)} (status {code}/{word})"
    if code:
        return f"{program} exited with status {code}"
    if state.killed_by is not None:
        return f"{program} was killed by {state.killed_by}"
    return f"systemd could not start the unit: {job}, {state.result}"


def signal_name(number: int) -> str:
    """SIGKILL for 9; "signal 99" for one that Python doesn't know."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
