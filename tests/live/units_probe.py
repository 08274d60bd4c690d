# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs inside a lab: what virtd.systemd.units promises, tried on its systemd. `test_units` picks a check by name.

Status 77 means that the check can't be made there.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from virtd import errors
from virtd.children import fifos
from virtd.systemd import names
from virtd.systemd.bus import Bus, BusError
from virtd.systemd.state import CLD_EXITED, CLD_KILLED, StartFailed
from virtd.systemd.transient import UnitSpec
from virtd.systemd.units import Units

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

NO_STDIO = (os.devnull, os.devnull, os.devnull)


def spec(name: str, *argv: str, **more: Any) -> UnitSpec:
    return UnitSpec(names.unit_name("qemu", name), f"probe {name}", "virtd-qemu.slice", argv, **more)


async def failure_of(operation: Awaitable[object]) -> errors.VirtdError:
    try:
        await operation
    except errors.VirtdError as exc:
        return exc
    raise AssertionError("it succeeded")


def descriptors(pid: int) -> list[os.stat_result]:
    found = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.stat(f"/proc/{pid}/fd/{entry}"))
    return found


async def check_that_nobody_waits_for_a_pipe_at_a_stop(systemd: Units) -> None:
    """ExecStop= is given the same paths, and ours is the only other end that there was."""
    directory = tempfile.mkdtemp() + "/pipes"
    ends = fifos.make(directory, fifos.NAMES)
    mark = f"{os.path.dirname(directory)}/stopped"
    stop = ("ExecStop", "a(sasb)", [("/usr/bin/touch", ["/usr/bin/touch", mark], False)])
    state = await systemd.start(
        spec("waits", "/bin/sleep", "1000", properties=(stop,)),
        (f"{directory}/stdin", f"{directory}/stdout", f"{directory}/stderr"),
    )
    for fd in ends:
        os.close(fd)
    fifos.retire(directory)
    await systemd.stop(state.name, timeout=60)
    assert os.path.exists(mark)
    await systemd.collect(state.name)


async def check_stdio_environment_and_status(systemd: Units) -> None:
    directory = tempfile.mkdtemp() + "/pipes"
    ends = fifos.make(directory, fifos.NAMES)
    theirs, (stdin, stdout, stderr) = [ends[0], ends[3], ends[5]], [ends[1], ends[2], ends[4]]
    script = "env; id -un; read line; echo got $line; echo complaint >&2; exit 42"
    state = await systemd.start(
        spec("child", "/bin/sh", "-c", script, environment=(("GREETING", "hello world"),), user="nobody"),
        (f"{directory}/stdin", f"{directory}/stdout", f"{directory}/stderr"),
    )
    for fd in theirs:
        os.close(fd)
    fifos.remove(directory)
    held = {os.fstat(fd).st_ino for fd in (stdin, stdout, stderr)}
    assert not held & {status.st_ino for status in descriptors(1)}, "PID 1 has kept some"
    assert (state.active, state.sub, state.load) == ("active", "running", "loaded"), state
    assert state.main_pid > 0
    assert state.running
    assert len(bytes.fromhex(state.invocation_id)) == 16
    assert state.description == "probe child"
    assert state.exited_at is None
    with open(f"/proc/{state.main_pid}/cgroup") as file:
        assert file.read().strip().endswith("/virtd.slice/virtd-qemu.slice/virtd-qemu-child.service")
    os.write(stdin, b"a line\n")
    with open(stdout) as out, open(stderr) as err:
        lines = out.read().splitlines()
        assert err.read() == "complaint\n"
    assert lines[-2:] == ["nobody", "got a line"], lines
    assert "GREETING=hello world" in lines
    leaked = ("NOTIFY_SOCKET=", "LISTEN_", "FDSTORE=", "WATCHDOG_")
    assert not [line for line in lines if line.startswith(leaked)], lines
    os.close(stdin)
    ended = await systemd.ended(state.name)
    assert ended is not None
    assert (ended.exec_code, ended.exec_status, ended.result, ended.active) == (CLD_EXITED, 42, "exit-code", "failed")
    assert ended.invocation_id == state.invocation_id
    assert ended.exited_at is not None
    assert abs(ended.exited_at - time.time()) < 60
    await systemd.collect(state.name)
    assert await systemd.state(state.name) is None


async def check_success_stays_readable(systemd: Units) -> None:
    state = await systemd.start(spec("short", "/bin/true"), NO_STDIO)
    ended = await systemd.ended(state.name)
    assert ended is not None
    assert (ended.active, ended.sub, ended.exec_code, ended.exec_status) == ("active", "exited", CLD_EXITED, 0)
    assert await systemd.list("virtd-qemu-*") == [(state.name, "probe short", "loaded", "active", "exited")]
    again = await failure_of(systemd.start(spec("short", "/bin/true"), NO_STDIO))
    assert isinstance(again, errors.Exists), again
    await systemd.collect(state.name)
    assert await systemd.list("virtd-qemu-*") == []
    # Nothing to collect is fine.
    await systemd.collect(state.name)


async def check_signals(systemd: Units) -> None:
    name = names.unit_name("qemu", "killed")
    await systemd.start(spec("killed", "/bin/sleep", "1000"), NO_STDIO)
    assert isinstance(await failure_of(systemd.collect(name)), errors.Busy)
    await systemd.kill(name, signal.SIGKILL)
    ended = await systemd.ended(name)
    assert ended is not None
    assert (ended.exec_code, ended.exec_status, ended.result) == (CLD_KILLED, signal.SIGKILL, "signal")
    for _ in range(2):
        # First nothing but the remains of it, then not even those.
        assert isinstance(await failure_of(systemd.kill(name, signal.SIGTERM)), errors.NotFound)
        await systemd.collect(name)


async def check_out_of_memory(systemd: Units) -> None:
    with open("/sys/fs/cgroup/cgroup.controllers") as file:
        if "memory" not in file.read().split():
            sys.exit(77)
    limits = (("MemoryMax", "t", 40 << 20), ("MemorySwapMax", "t", 0))
    hungry = spec("hungry", "/usr/bin/python3", "-c", "x = b'x' * (400 << 20)", properties=limits)
    await systemd.start(hungry, NO_STDIO)
    ended = await systemd.ended(hungry.name)
    assert ended is not None
    assert (ended.result, ended.exec_code, ended.exec_status) == ("oom-kill", CLD_KILLED, signal.SIGKILL), ended
    await systemd.collect(hungry.name)


async def check_stop(systemd: Units) -> None:
    await systemd.start(spec("stopped", "/bin/sleep", "1000"), NO_STDIO)
    name = names.unit_name("qemu", "stopped")
    await systemd.stop(name)
    assert await systemd.state(name) is None
    await systemd.stop(name)


async def check_failed_starts(systemd: Units) -> None:
    cases = [
        (spec("f", "/no/such/program"), "cannot execute /no/such/program"),
        (spec("f", "/etc/passwd"), "203/EXEC"),
        (spec("f", "/bin/true", user="no-such-user"), "217/USER"),
        (spec("f", "/bin/true", properties=(("BindPaths", "a(ssbt)", [("/no", "/no", False, 0)]),)), "226/NAMESPACE"),
    ]
    for wrong, words in cases:
        failed = await failure_of(systemd.start(wrong, NO_STDIO))
        assert isinstance(failed, StartFailed), failed
        assert words in failed.message, failed.message
        assert failed.state is not None
        assert failed.state.active == "failed"
        await systemd.collect(wrong.name)
    wrong = spec("f", "/bin/true", properties=(("NoSuchProperty", "b", True),))
    refused = await failure_of(systemd.start(wrong, NO_STDIO))
    assert type(refused) is errors.HostError, refused
    assert "NoSuchProperty" in refused.message
    assert await systemd.state(wrong.name) is None


async def check_fifty_at_once(systemd: Units) -> None:
    before = len(os.listdir("/proc/self/fd"))
    states = await asyncio.gather(*(systemd.start(spec(f"g{n}", "/bin/sleep", "1000"), NO_STDIO) for n in range(50)))
    assert len({state.main_pid for state in states}) == 50
    assert all(state.running for state in states)
    assert len(await systemd.list("virtd-qemu-g*")) == 50
    await asyncio.gather(*(systemd.stop(state.name) for state in states))
    assert await systemd.list("virtd-qemu-g*") == []
    assert len(os.listdir("/proc/self/fd")) == before


async def check_names_with_odd_characters(systemd: Units) -> None:
    for name in ("a-b_c.d", ".hidden", "-", "x" * 64, "1.service"):
        state = await systemd.start(spec(name, "/bin/sleep", "1000"), NO_STDIO)
        assert names.object_name("qemu", state.name) == name
        assert state.running
        await systemd.stop(state.name)


ODD_NAMES = (
    "a b", "it's", 'a "b"', "back\\slash\\", "tab\t", "100%", "%n", "$HOME ${HOME}", "a:b", "a;b ;", "new\nline",
    "\x01", "ü→", "#", "*[x]", " around ",
)  # fmt: skip
# What a unit sees: 1 for each file of the directory that it can read, and 2 more for each that it can write.
SEES = """
import os, sys
def access(path):
    try:
        return (open(path).read() == os.path.basename(path)) + 2 * os.access(path, os.W_OK)
    except OSError:
        return 0
top = sys.argv[2]
seen = {name: access(f"{top}/{name}") for name in os.listdir(top)}
hidden = os.listdir("/virtd odd: top")
open(sys.argv[1], "w").write(repr((seen, hidden)))
"""


async def check_odd_paths_mean_the_same_after_a_reload(systemd: Units) -> None:
    directory = tempfile.mkdtemp()
    top, result, program = "/srv/it's %n", f"{directory}/result", f"{directory}/program"
    os.makedirs(top, exist_ok=True)
    os.makedirs("/virtd odd: top/secret", exist_ok=True)
    for name in (*ODD_NAMES, "not shown"):
        with open(f"{top}/{name}", "w") as file:
            file.write(name)
    with open(program, "w") as file:
        file.write(SEES)
    with open(f"{directory}/run.sh", "w") as file:
        file.write(f'exec python3 {program} {result}.$1 "{top}"')
    binds = [(f"{top}/{name}", f"{top}/{name}", False, 0) for name in ODD_NAMES]
    properties = (
        ("TemporaryFileSystem", "a(ss)", [(path, "ro,mode=0755") for path in ("/run", "/srv", "/virtd odd: top")]),
        ("BindPaths", "a(ssbt)", [(directory, directory, False, 0), *binds[::2]]),
        ("BindReadOnlyPaths", "a(ssbt)", binds[1::2]),
        ("ProtectSystem", "s", "strict"),
        ("PrivateDevices", "b", True),
        ("ExecStop", "a(sasb)", [("/bin/sh", ["/bin/sh", f"{directory}/run.sh", "stop"], False)]),
    )
    probe = spec(
        "odd", "/bin/sh", "-c", f"sh {directory}/run.sh start; exec sleep 1000; $1 'a' \"b\" %n \\", "\\",
        properties=properties,
        environment=(("PATH", os.environ["PATH"]),),
        after=names.mount_units(f"{top}/a:b/c"),
        aliases="/run/virtd-probe/qemu.odd",
    )  # fmt: skip
    state = await systemd.start(probe, NO_STDIO)
    while not os.path.exists(f"{result}.start"):  # noqa: ASYNC110
        await asyncio.sleep(0.05)

    async def settings() -> dict[str, object]:
        # What has a time in it is the run of a command, and no setting.
        found = {}
        for interface, properties in ((names.SERVICE, SETTINGS), (names.UNIT, ("After", "Description", "LoadState"))):
            for name in properties:
                (value,) = await systemd.bus.call(
                    names.SYSTEMD, names.object_path(state.name), names.PROPERTIES, "Get", "ss", (interface, name)
                )
                found[name] = sorted(value) if isinstance(value, list) else value
        return found

    before = await settings()
    await systemd.bus.call(names.SYSTEMD, names.MANAGER_PATH, names.MANAGER, "Reload", "", ())
    assert await settings() == before
    await systemd.stop(state.name)
    await systemd.collect(state.name)
    expected = {name: 1 if number % 2 else 3 for number, name in enumerate(ODD_NAMES)}
    for when in ("start", "stop"):
        with open(f"{result}.{when}") as file:
            assert ast.literal_eval(file.read()) == (expected, []), when


SETTINGS = ("BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "Environment", "ProtectSystem", "PrivateDevices")


async def check_store(systemd: Units) -> None:
    """This process is no service: another unit's store is asked for, and one that isn't there."""
    assert await systemd.store_count("systemd-journald.service") >= 0
    dump = await systemd.store_dump("systemd-journald.service")
    try:
        # Came with the same version.
        await systemd.service_property("systemd-journald.service", "FileDescriptorStorePreserve")
    except BusError:
        assert dump is None
    else:
        assert dump is not None
        assert len(dump) == await systemd.store_count("systemd-journald.service")


async def check_another_connection_sees_the_same(systemd: Units) -> None:
    """What a daemon finds after its restart."""
    state = await systemd.start(spec("outlives", "/bin/sleep", "1000"), NO_STDIO)
    bus = await Bus.open()
    assert await Units(bus).state(state.name) == state
    await bus.close()
    await systemd.stop(state.name)


async def main(check: Callable[[Units], Awaitable[None]]) -> None:
    bus = await Bus.open()
    systemd = Units(bus)
    await check(systemd)
    await systemd.close()
    await bus.close()


if __name__ == "__main__":
    asyncio.run(main(globals()[sys.argv[1]]))
