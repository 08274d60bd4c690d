# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sweep's operations on a host that isn't tidy: what others change, what comes late, is odd, full or taken."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import subprocess
from typing import TYPE_CHECKING, ClassVar

from tests.harness import network_state
from tests.proof.sweep import scene
from tests.proof.sweep.operations import Operation, expect
from tests.proof.sweep.others import NETWORK, OfNetwork
from tests.proof.sweep.others import state as state_of
from tests.proof.sweep.scene import ALIVE, HERE, IMAGES, Broken, Refused, call, info, until

if TYPE_CHECKING:
    from collections.abc import Iterator

PORTER, ODD, LATE, WRITER, FIRST, RIVAL = "porter", "odd", "late", "writer", "first", "rival"
BRIDGE, TAP = f"vd-{NETWORK}", f"vt-{PORTER}-0"
ODD_PATH = f'{IMAGES}/it\'s "odd" 100% $HOME; a\\b ü.img'
SMALL = "/srv/small"  # a file system that can be full
ROOM = "48M"
AT_BOOT = 45.0  # seconds in which what waits is surely tried once more


def run(*command: str) -> str:
    """What a command says. Raises Broken when it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"{command}: {done.stderr.strip()}")
    return done.stdout


def state(name: str) -> str:
    """A domain's; "" if there is none."""
    try:
        return str(info(name)["state"])
    except Refused as exc:
        if exc.kind == "NotFound":
            return ""
        raise


def remove(*names: str) -> None:
    for name in names:
        for method in ("Stop", "Undefine"):
            with contextlib.suppress(Refused):
                call(method, name=name)


def define(name: str, more: str = "") -> None:
    """A domain with a disk of its own, unless there is one."""
    if not state(name):
        scene.make_image(name)
        call("Define", text=scene.definition(name, more=more), source="sweep")


def start(name: str) -> None:
    if state(name) not in ALIVE:
        call("Start", name=name)


class PutBack(OfNetwork):
    """Somebody changes what virtd has made of the kernel's for a network, and a guest's port in it."""

    command: ClassVar[tuple[str, ...]] = ()
    before = ""

    def prepare(self) -> None:
        super().prepare()
        call("Network.Start", name=NETWORK)  # nothing is left alone any longer for having been changed so often
        define(PORTER, more=f'[[nic]]\nnetwork = "{NETWORK}"\n')
        start(PORTER)
        self.before = self.before or self.made()

    def made(self) -> str:
        rules = run("nft", "--stateless", "list", "ruleset")
        return run("sh", "-c", network_state(BRIDGE, TAP)) + rules

    def act(self) -> None:
        run(*self.command)
        until("all as before", self.as_before)

    def as_before(self) -> bool:
        now = self.made()
        if now != self.before:
            lines = set(self.before.splitlines()) ^ set(now.splitlines())
            raise Broken(f"differs: {sorted(lines)[:4]}")
        return True

    def again(self) -> None:
        call("Network.Start", name=NETWORK)
        self.act()

    def agreement(self) -> None:
        super().agreement()
        if self.before and state(PORTER) in ALIVE:
            self.as_before()

    def clear(self) -> None:
        remove(PORTER)
        self.before = ""
        super().clear()


class PutBackPort(PutBack):
    name = "put-back-port"
    command = ("ip", "link", "set", TAP, "nomaster")


class PutBackBridge(PutBack):
    name = "put-back-bridge"
    command = ("ip", "link", "del", BRIDGE)


class PutBackRules(PutBack):
    name = "put-back-rules"
    command = ("nft", "flush", "ruleset")


class Probe(PutBack):
    """Somebody's rules drop what guests send, which is found out by sending it, and go away again."""

    name = "probe"
    most = 60  # of more than a thousand calls, alike for each packet, and a look takes some seconds
    drops = "table inet stranger { chain forward { type filter hook forward priority 0; policy drop; }; }"

    def act(self) -> None:
        run("nft", self.drops)
        try:
            until("what is dropped", lambda: call("Network.Info", name=NETWORK)["object"]["problems"])
        finally:
            run("nft", "delete table inet stranger")

    def agreement(self) -> None:
        super().agreement()
        taps = [name for name in os.listdir("/sys/class/net") if name.startswith("vt--")]
        expect("taps of probes", taps, [])


class Odd(Operation):
    """A domain with a path that systemd would misread, of a disk that others may read as well."""

    def prepare(self) -> None:
        if not os.path.exists(ODD_PATH):
            with open(ODD_PATH, "wb") as file:
                file.truncate(1 << 20)
            os.chmod(ODD_PATH, 0o600)
        path = json.dumps(ODD_PATH, ensure_ascii=False)
        define(ODD, more=f'[[disk]]\npath = {path}\nformat = "raw"\nreadonly = true\n')

    def agreement(self) -> None:
        alive = state(ODD) in ALIVE
        expect("links", os.path.lexists(f"/run/virtd/paths/qemu.{ODD}"), alive)
        with open(ODD_PATH, "rb") as file:
            listed = "system.posix_acl_access" in os.listxattr(file.fileno())
            expect("who may read it", listed or os.fstat(file.fileno()).st_uid != 0, alive)

    def clear(self) -> None:
        remove(ODD)
        for path in (ODD_PATH, scene.image(ODD)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


class OddStart(Odd):
    name = "odd-start"

    def prepare(self) -> None:
        super().prepare()
        call("Stop", name=ODD)

    def act(self) -> None:
        call("Start", name=ODD)

    def judge(self) -> None:
        expect("the domain", state(ODD), "stopped", "running")

    def again(self) -> None:
        self.act()
        expect("the domain", state(ODD), "running")


class OddStop(Odd):
    name = "odd-stop"

    def prepare(self) -> None:
        super().prepare()
        start(ODD)

    def act(self) -> None:
        call("Stop", name=ODD)

    def judge(self) -> None:
        expect("the domain", state(ODD), "stopped", "running")

    def again(self) -> None:
        self.act()
        expect("the domain", state(ODD), "stopped")


class LateAutostart(Operation):
    """The first start of the daemon after a boot, at which a guest's disk isn't there yet; then it comes."""

    name = "autostart-late"
    start = True

    def prepare(self) -> None:
        self.clear()
        call("Define", text=scene.definition(LATE, more="autostart = true"), source="sweep")

    def held(self) -> None:
        for mark in ("/var/lib/virtd/autostarted", "/run/virtd/autostarted"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(mark)

    def act(self) -> None:
        until("it waits", self.waits)
        scene.make_image(LATE)
        # That a file is there tells nobody; that an interface is does.
        run("ip", "link", "add", "sweep0", "type", "bridge")
        run("ip", "link", "del", "sweep0")
        self.runs()

    def waits(self) -> bool:
        with open("/var/lib/virtd/waiting.json") as file:
            on_record = json.load(file)["objects"]
        return bool(info(LATE)["waits"]) and f"qemu/{LATE}" in on_record

    def runs(self) -> None:
        until("its start", lambda: state(LATE) == "running", AT_BOOT)

    def judge(self) -> None:
        self.runs()
        expect("it waits", info(LATE)["waits"], False)

    def again(self) -> None:
        self.clear()

    def agreement(self) -> None:
        expect("what waits is on record", os.path.exists("/var/lib/virtd/waiting.json"), False)

    def clear(self) -> None:
        remove(LATE)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scene.image(LATE))


class Standstill(Operation):
    """A guest writes to a disk that is full, stands still, and is resumed once there is room."""

    name = "standstill"

    def prepare(self) -> None:
        if not os.path.ismount(SMALL):
            os.makedirs(SMALL, exist_ok=True)
            run("mount", "-t", "tmpfs", "-o", f"size={ROOM},mode=711", "sweep", SMALL)
        self.give_room()
        disk = f"{SMALL}/disk.img"
        if state(WRITER) not in ALIVE:
            with open(f"{HERE}/writing.img", "rb") as file:
                sector = file.read()
            with open(disk, "wb") as file:
                file.write(sector)
                file.truncate(66 << 20)
            os.chown(disk, 0, 0)
            os.chmod(disk, 0o600)
            text = f'name = "{WRITER}"\nmemory = "16M"\nrng = false\n[[disk]]\npath = "{disk}"\nformat = "raw"\n'
            call("Define", text=text, source="sweep")
            call("Start", name=WRITER)
        call("Resume", name=WRITER)
        run("fallocate", "--punch-hole", "-o", "4096", "-l", str(65 << 20), disk)

    def give_room(self) -> None:
        run("mount", "-o", f"remount,size={ROOM}", SMALL)

    def act(self) -> None:
        until("a full file system", self.fill)
        until("the standstill", self.stands_still)
        try:
            call("Resume", name=WRITER)
        except Refused as exc:
            expect("the refusal", "stands still" in str(exc), True)
        else:
            raise Broken("it was resumed though its disk is full")
        self.give_room()
        call("Resume", name=WRITER)

    def fill(self) -> bool:
        """Leave no room. Raises Broken when the guest has just written one more page."""
        used = os.statvfs(SMALL)
        run("mount", "-o", f"remount,size={(used.f_blocks - used.f_bfree) * used.f_bsize}", SMALL)
        return True

    def stands_still(self) -> bool:
        """On record, and told with its disk."""
        found = info(WRITER)
        told = call("Status")["status"]["problems"]
        return (
            found["state"] == "paused"
            and (found["standstill"] or {}).get("disk") == "disk[0]"
            and any(" free" in problem["text"] for problem in told)
        )

    def judge(self) -> None:
        self.give_room()
        if state(WRITER) == "paused":
            call("Resume", name=WRITER)
        expect("it stands still", info(WRITER)["standstill"], None)

    def again(self) -> None:
        self.judge()
        size = os.stat(f"{scene.LOGS}/{WRITER}.console.log").st_size
        until("its next line", lambda: os.stat(f"{scene.LOGS}/{WRITER}.console.log").st_size > size)

    def clear(self) -> None:
        remove(WRITER)
        for path in glob.glob(f"{scene.LOGS}/{WRITER}.*"):
            os.unlink(path)
        run("umount", SMALL)


class Conflict(OfNetwork):
    """A start that is refused, for another has what it needs: a guest's disk, a network's port of the host."""

    name = "conflict"

    def prepare(self) -> None:
        super().prepare()
        call("Network.Stop", name=NETWORK, force=True)
        define(FIRST)
        start(FIRST)
        if not state(RIVAL):
            call("Define", text=scene.definition(FIRST).replace(f'"{FIRST}"', f'"{RIVAL}"'), source="sweep")
        for name, number in ((FIRST, 8), (RIVAL, 9)):
            if not state_of("Network", name):
                text = f'name = "{name}"\ndns = false\n[ipv4]\naddress = "10.211.{number}.1/24"\ndhcp = false\n'
                text += f'[[forward]]\nport = 8080\nto = "10.211.{number}.9"\nto_port = 80\n'
                call("Network.Define", text=text, source="sweep")
        call("Network.Start", name=FIRST)

    def act(self) -> None:
        for method in ("Start", "Network.Start"):
            with self.refused():
                call(method, name=RIVAL)

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        try:
            yield
        except Refused as exc:
            if "in use by" not in str(exc):
                raise
        else:
            raise Broken("two have what only one can have")

    def judge(self) -> None:
        expect("the rival", (state(RIVAL), state_of("Network", RIVAL)), ("stopped", "inactive"))
        expect("the first", (state(FIRST), state_of("Network", FIRST)), ("running", "active"))
        expect("the rival's bridge", os.path.exists(f"/sys/class/net/vd-{RIVAL}"), False)

    def again(self) -> None:
        self.act()
        self.judge()

    def clear(self) -> None:
        remove(RIVAL, FIRST)
        for name in (RIVAL, FIRST):
            for method, more in (("Stop", {"force": True}), ("Undefine", {})):
                with contextlib.suppress(Refused):
                    call(f"Network.{method}", name=name, **more)
        super().clear()


def untidy_operations() -> Iterator[Operation]:
    for kind in (
        PutBackPort, PutBackBridge, PutBackRules, Probe, OddStart, OddStop, LateAutostart, Standstill, Conflict,
    ):  # fmt: skip
        yield kind()
