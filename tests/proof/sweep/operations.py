# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the sweep cuts off: for each operation how it begins, what it does, and what may be seen afterwards."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

from tests.proof.sweep import scene
from tests.proof.sweep.scene import ALIVE, DEFINITIONS, Broken, Gone, Refused, call, info, until

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET = "target"


class Operation:
    """One kind of thing that the daemon does.

    `prepare` brings the target to where it begins; `act` does it, and may be cut off by Gone; `judge` says what is
    wrong with what came of it, with a daemon that has settled; `again` does it once more, as a caller who heard
    nothing would, and sees that it is done. `start` says that it is the start of the daemon itself which is cut off.
    """

    name = ""
    start = False
    settings = ""  # virtd.toml, for this operation
    agrees = True  # everything agrees when it begins
    mends = False  # a system call that failed is a problem until it is done again, and its caller was told so
    most = 0  # so many points are tried, chosen by the seed; 0 for all
    calls = ""  # only these system calls; "" for all that change something

    def prepare(self) -> None: ...

    def held(self) -> None:
        """With `start`: the daemon is held before its first step."""

    def act(self) -> None: ...

    def judge(self) -> None: ...

    def again(self) -> None:
        self.act()

    def agreement(self) -> None:
        """What is told of things other than domains agrees. Raises Broken, and is then asked again for a while."""

    def clear(self) -> None:
        """Remove what `prepare` made, if the next operation could be bothered by it."""


def state() -> str:
    """The target's; "" if there is none."""
    try:
        return str(info(TARGET)["state"])
    except Refused as exc:
        if exc.kind == "NotFound":
            return ""
        raise


def expect(what: str, found: Any, *wanted: Any) -> None:
    if found not in wanted:
        raise Broken(f"{what}: {found!r}, not {' or '.join(map(repr, wanted))}")


def undefine() -> None:
    stop()
    with contextlib.suppress(Refused):
        call("Undefine", name=TARGET)


def define(memory: str = "16M", more: str = "") -> None:
    call("Define", text=scene.definition(TARGET, memory, more), source="sweep")


def stop() -> None:
    if state() in ALIVE:
        call("Stop", name=TARGET)


def run() -> None:
    """The target runs, and is up."""
    if not state():
        define()
    if state() not in ALIVE:
        for path in glob.glob(f"{scene.LOGS}/{TARGET}.*"):
            os.unlink(path)
        scene.make_image(TARGET)
        call("Start", name=TARGET)
    until("the target's first line", lambda: b"line 0000000001" in console())


def console() -> bytes:
    """All that the target has said since its last start."""
    base = f"{scene.LOGS}/{TARGET}.console.log"
    data = b""
    for path in [*sorted(glob.glob(f"{base}.[0-9]*"), key=lambda path: -int(path.rpartition(".")[2])), base]:
        with open(path, "rb") as file:
            data += file.read()
    return data


def whole_console() -> None:
    from tests.harness import check

    tally = check(console())
    if not tally.whole or tally.first != 1:
        raise Broken(f"the target's console: {tally.lost} lost, {tally.repeated} repeated, {tally.broken[:2]}")


def works() -> None:
    """The target runs, obeys and answers."""
    expect("the target", state(), *ALIVE)
    call("Resume", name=TARGET)
    call("Suspend", name=TARGET)
    expect("suspended", state(), "paused")
    call("Resume", name=TARGET)
    expect("resumed", state(), "running")
    word = f"hello-{time.monotonic_ns()}"
    scene.type_on(TARGET, word)
    until("the target's answer", lambda: f"{word}\r\n".encode() in console(), 10)
    whole_console()


class Define(Operation):
    name = "define"

    def prepare(self) -> None:
        undefine()
        scene.make_image(TARGET)

    def act(self) -> None:
        define()

    def judge(self) -> None:
        expect("the target", state(), "", "stopped")

    def again(self) -> None:
        define()
        expect("the target", state(), "stopped")
        expect("its uuid's length", len(info(TARGET)["uuid"]), 36)


class Redefine(Operation):
    name = "redefine"

    def prepare(self) -> None:
        undefine()
        define("16M")
        run()

    def act(self) -> None:
        define("24M")

    def judge(self) -> None:
        memory = re.findall(r'memory = "(.*)"', call("Dump", name=TARGET)["text"])
        expect("the memory", memory, ["16M"], ["24M"])
        expect("pending", info(TARGET)["pending"], memory == ["24M"])

    def again(self) -> None:
        define("24M")
        expect("pending", info(TARGET)["pending"], True)
        stop()


class Start(Operation):
    name = "start"

    def prepare(self) -> None:
        undefine()
        for path in glob.glob(f"{scene.LOGS}/{TARGET}.*"):
            os.unlink(path)
        scene.make_image(TARGET)
        define()

    def act(self) -> None:
        call("Start", name=TARGET)

    def judge(self) -> None:
        expect("the target", state(), "stopped", "running")

    def again(self) -> None:
        was = info(TARGET)["pid"]
        expect("changed", call("Start", name=TARGET)["changed"], was is None)
        expect("the PID", info(TARGET)["pid"], *([was] if was else [info(TARGET)["pid"]]))
        until("the target's first line", lambda: b"line 0000000001" in console())
        works()


class Ending(Operation):
    """One that ends the target. `cause`: what has to be on record then."""

    cause = ""

    def prepare(self) -> None:
        run()

    def end(self) -> None: ...

    def act(self) -> None:
        self.end()
        self.done()

    def judge(self) -> None:
        if state() in ALIVE:
            works()
        else:
            self.done()

    def again(self) -> None:
        with contextlib.suppress(Refused):  # it has ended
            self.end()
        until("the target's end", lambda: state() not in ALIVE)
        self.done()

    def done(self) -> None:
        until("the target's end", lambda: state() in ("stopped", "crashed"), 10)
        ending = info(TARGET)["exit"]
        expect("the cause of the target's end", ending and ending["cause"], self.cause)
        whole_console()


class Stop(Ending):
    name, cause = "stop", "stop"

    def end(self) -> None:
        call("Stop", name=TARGET)


class Shutdown(Ending):
    name, cause = "shutdown", "shutdown"

    def end(self) -> None:
        call("Shutdown", name=TARGET, timeout=20)


class Kill(Ending):
    name, cause = "kill", "killed"

    def end(self) -> None:
        call("Kill", name=TARGET, signal=int(signal.SIGKILL))


class Suspend(Operation):
    name = "suspend"

    def prepare(self) -> None:
        run()
        call("Resume", name=TARGET)

    def act(self) -> None:
        call("Suspend", name=TARGET)
        call("Resume", name=TARGET)

    def judge(self) -> None:
        expect("the target", state(), *ALIVE)

    def again(self) -> None:
        self.act()
        works()


class Undefine(Operation):
    name = "undefine"

    def prepare(self) -> None:
        run()
        stop()

    def act(self) -> None:
        call("Undefine", name=TARGET)

    def judge(self) -> None:
        expect("the target", state(), "", "stopped")

    def again(self) -> None:
        with contextlib.suppress(Refused):
            call("Undefine", name=TARGET)
        expect("the target", state(), "")


class Reload(Operation):
    """One definition is new and has no uuid, one has changed, one is gone."""

    name = "reload"
    agrees = False
    mends = True

    def prepare(self) -> None:
        for name in ("fresh", "former"):
            with contextlib.suppress(Refused):
                call("Undefine", name=name)
        undefine()
        define("16M")
        call("Define", text=scene.definition("former"), source="sweep")
        path = f"{DEFINITIONS}/{TARGET}.toml"
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(text.replace("16M", "24M"))
        with open(f"{DEFINITIONS}/fresh.toml", "w") as file:
            file.write(scene.definition("fresh"))
        os.unlink(f"{DEFINITIONS}/former.toml")

    def act(self) -> None:
        call("Reload")

    def judge(self) -> None:
        expect("the memory", "24M" in call("Dump", name=TARGET)["text"], True)
        expect("the new one's state", info("fresh")["state"], "stopped")
        with open(f"{DEFINITIONS}/fresh.toml") as file:
            expect("its uuid is in its file", info("fresh")["uuid"] in file.read(), True)
        with contextlib.suppress(Refused):
            raise Broken(f"the removed one is still there: {info('former')}")

    def again(self) -> None:
        call("Reload")
        self.judge()


class Console(Operation):
    name = "console"

    def prepare(self) -> None:
        run()

    def act(self) -> None:
        with scene.Connection() as connection:
            connection.call("OpenConsole", more=True, name=TARGET, force=True)
            os.write(connection.fds[0], b"typed\n")
            call("Follow", name=TARGET, log="console", lines=3)
        time.sleep(0.05)  # the daemon notices that we hung up, and says so in the record

    def judge(self) -> None:
        works()


class Rotation(Operation):
    """The fast guest fills a log of 64 KiB again and again; nothing is asked of the daemon."""

    name = "rotation"
    settings = '[log]\nmax_size = "64K"\nbackups = 20\n'
    calls = "openat,rename,unlink,sendmsg,splice,ftruncate"

    def act(self) -> None:
        inode = os.stat(f"{scene.LOGS}/fast.console.log").st_ino

        def rotated() -> bool:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(f"{scene.LOGS}/fast.console.log").st_ino != inode:
                    return True
            if not scene.main_pid():
                raise Gone("rotation")
            return False

        limit = time.monotonic() + 20
        while not rotated() and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.2)  # its slot follows


class Adoption(Operation):
    """The start of a daemon that finds guests running."""

    name = "adoption"
    start = True

    def prepare(self) -> None:
        run()

    def act(self) -> None:
        until("the adoption", scene.settled)

    def judge(self) -> None:
        works()


class Ended(Operation):
    """The start of a daemon that finds a guest ended."""

    name = "adoption-ended"
    start = True

    def prepare(self) -> None:
        run()

    def held(self) -> None:
        subprocess.run(["systemctl", "kill", "-s", "KILL", f"virtd-qemu-{TARGET}.service"], check=True)
        until("the target's death", lambda: "failed" in scene.systemctl("is-active", f"virtd-qemu-{TARGET}.service"))

    def act(self) -> None:
        until("the adoption", scene.settled)
        self.judge()

    def judge(self) -> None:
        expect("the target", state(), "crashed")
        ending = info(TARGET)["exit"]
        expect("its end", (ending["cause"], ending["signal"]), ("killed", "SIGKILL"))
        whole_console()

    def again(self) -> None:
        self.judge()


class Autostart(Operation):
    """The first start of the daemon after a boot, with three guests to be started."""

    name = "autostart"
    start = True
    guests = ("auto1", "auto2")

    def prepare(self) -> None:
        for name in self.guests:
            self.remove(name)
            scene.make_image(name)
            call("Define", text=scene.definition(name, more="autostart = true"), source="sweep")

    def remove(self, name: str) -> None:
        for method in ("Stop", "Undefine"):
            with contextlib.suppress(Refused):
                call(method, name=name)

    def held(self) -> None:
        for mark in ("/var/lib/virtd/autostarted", "/run/virtd/autostarted"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(mark)

    def act(self) -> None:
        for name in self.guests:
            until(f"the autostart of {name}", functools.partial(self.runs, name), 15)

    def runs(self, name: str) -> bool:
        return bool(info(name)["state"] == "running")

    def judge(self) -> None:
        self.act()

    def again(self) -> None:
        for name in self.guests:
            self.remove(name)


def all_operations() -> Iterator[Operation]:
    for kind in (
        Define, Redefine, Start, Stop, Shutdown, Kill, Suspend, Undefine, Reload, Console, Rotation, Adoption, Ended,
        Autostart,
    ):  # fmt: skip
        yield kind()
