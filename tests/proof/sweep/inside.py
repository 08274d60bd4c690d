# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program that runs in the lab: `python3 -m tests.proof.sweep.inside`. See --help.

For each operation it first counts the calls that change something. Then, for each of them, it brings everything back
to where the operation begins, has the daemon killed (or the call fail) right there, and looks at what the next daemon
makes of it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.proof.sweep import scene
from tests.proof.sweep.operations import Operation, all_operations
from tests.proof.sweep.others import other_operations
from tests.proof.sweep.scene import HERE, Broken, Gone, Guest, Refused, until
from tests.proof.sweep.untidy import untidy_operations

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TRACE = "/run/sweep-trace"
# All that cut knows but for splice, which happens all the time while a guest has something to say.
CALLS = (
    "open,rename,unlink,mkdir,rmdir,chmod,chown,link,symlink,openat,renameat,renameat2,unlinkat,mkdirat,fchmodat,"
    "fchownat,fchmod,fchown,ftruncate,fsync,write,pwrite64,writev,sendmsg,sendto,connect,bind,kill,pidfd_send_signal,"
    "pipe2,memfd_create,setxattr,mount,umount2,mknod,mknodat"
)
QUIET = 0.15  # seconds without a further call after which an operation counts as over
MOST = 400  # points of one operation; more would mean that something doesn't end
# Which errors a call may well return. The rest (a socket of D-Bus that breaks off, say) is tried by other tests.
ERRORS = {
    "openat": ("ENOSPC", "EMFILE"),
    "write": ("ENOSPC",),
    "fsync": ("EIO",),
    "rename": ("ENOSPC",),
    "mkdir": ("ENOSPC",),
    "mknod": ("ENOSPC",),
    "mknodat": ("ENOSPC",),
    "unlink": ("EROFS",),
    "chown": ("EPERM",),
    "fchown": ("EPERM",),
    "fchmod": ("EPERM",),
    "sendmsg": ("EAGAIN", "ENOBUFS", "ETOOMANYREFS"),
    "connect": ("EAGAIN", "ECONNREFUSED"),
    "pipe2": ("EMFILE",),
    "splice": ("ENOSPC", "EIO"),
}


@dataclass
class Point:
    """One place in an operation. `call` is what it is right before."""

    operation: str
    number: int
    error: str = ""
    call: str = ""
    problem: str = ""


@dataclass
class Cutter:
    """The tracer, attached to the daemon."""

    pid: int
    number: int = 0
    error: str = ""
    calls: str = ""
    lines: list[str] = field(default_factory=list)

    def __enter__(self) -> Cutter:
        command = [f"{HERE}/cut", "-o", TRACE]
        if self.number:
            command += ["-n", str(self.number)]
        if self.error:
            command += ["-e", str(getattr(errno, self.error))]
        command += ["-c", self.calls or CALLS]
        self._process = subprocess.Popen([*command, str(self.pid)], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"attached\n":
            raise Broken("the tracer did not attach")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self.lines = self.read()

    def read(self) -> list[str]:
        with open(TRACE) as file:
            return [line.rstrip("\n") for line in file if not line.startswith("end")]

    def await_quiet(self) -> None:
        """Until nothing more happens, or the daemon has died of it."""
        count = -1
        while self._process.poll() is None and count != (count := len(self.read())):
            time.sleep(QUIET)


class Sweep:
    def __init__(self, seed: int, *, with_fsck: bool, errors: bool) -> None:
        self.random = random.Random(seed)
        self.with_fsck = with_fsck
        self.errors = errors
        self.points: list[Point] = []
        self.bystander = Guest("bystander")
        self.guests = [self.bystander]

    def run(self, operation: Operation, sample: int | None) -> None:
        if operation.settings:
            with open("/etc/virtd/virtd.toml", "w") as file:
                file.write(operation.settings)
            scene.systemctl("restart", "virtd.service")
            self.guests.append(Guest("fast", "fast"))
        sample = min(filter(None, (sample, operation.most)), default=None)
        before = len(self.points)
        started = time.monotonic()
        try:
            calls = self.count(operation)
            points = list(self.choose(operation, calls, sample))
            for point in points:
                self.try_(operation, point)
            if sample is None and not self.errors:
                self.beyond(operation, len(calls))
        finally:
            with contextlib.suppress(Refused, Gone):
                operation.clear()
            if operation.settings:
                self.guests.pop()
                scene.call("Stop", name="fast")
                scene.call("Undefine", name="fast")
                os.unlink("/etc/virtd/virtd.toml")
                scene.systemctl("restart", "virtd.service")
        mine = self.points[before:]
        failed = [point for point in mine if point.problem]
        told = {
            "operation": operation.name,
            "calls": len(calls),
            "tried": len(mine),
            "held": len(mine) - len(failed),
            "seconds": round(time.monotonic() - started, 1),
        }
        print(json.dumps(told), flush=True)

    def count(self, operation: Operation) -> list[str]:
        """The operation without a cut: what it calls, one line each."""
        operation.prepare()
        until("agreement", scene.settled)
        with self.traced(operation) as cutter:
            operation.act()
            if not operation.calls:
                cutter.await_quiet()
        self.check(operation)
        return cutter.lines

    def choose(self, operation: Operation, calls: list[str], sample: int | None) -> Iterator[Point]:
        points = []
        for line in calls:
            number, _comm, call, _what = line.split("\t", 3)
            for error in ERRORS.get(call, ()) if self.errors else ("",):
                points.append(Point(operation.name, int(number), error))
        if sample is not None and len(points) > sample:
            points = sorted(self.random.sample(points, sample), key=lambda point: (point.number, point.error))
        yield from points

    def beyond(self, operation: Operation, count: int) -> None:
        """Runs differ: go on past the last call that was counted, until nothing is cut off any more."""
        for number in range(count + 1, MOST):
            point = Point(operation.name, number)
            self.try_(operation, point)
            if not point.call:
                self.points.pop()
                return

    @contextlib.contextmanager
    def traced(self, operation: Operation, number: int = 0, error: str = "") -> Iterator[Cutter]:
        if operation.start:
            pid = scene.begin_stopped()
            operation.held()
        else:
            pid = scene.main_pid()
        with Cutter(pid, number, error, operation.calls) as cutter:
            yield cutter

    def try_(self, operation: Operation, point: Point) -> None:
        self.points.append(point)
        try:
            operation.prepare()
            until("agreement before", lambda: scene.settled() and (not operation.agrees or scene.agreement()), 10)
            with self.traced(operation, point.number, point.error) as cutter:
                pid = cutter.pid
                with contextlib.suppress(Gone):
                    try:
                        operation.act()
                    except Refused as exc:
                        told = str(exc).partition(":")[2]
                        if not point.error or exc.kind == "VirtdError" or re.search(r"\w(Error|Exception)\b", told):
                            raise Broken(f"its caller was told {exc}") from exc
                    except Broken:
                        if not operation.start:
                            raise
                if not operation.calls:
                    cutter.await_quiet()
            if len(cutter.lines) >= point.number:
                point.call = " ".join(cutter.lines[point.number - 1].split("\t")[1:])[:150]
                if not point.error:
                    until("the next daemon", lambda: scene.main_pid() not in (0, pid))
            self.check(operation)
        except (Broken, Refused, OSError, Gone, LookupError, subprocess.SubprocessError) as exc:
            point.problem = f"{type(exc).__name__}: {exc}"
            print(json.dumps(point.__dict__), flush=True)
            self.recover()

    def check(self, operation: Operation) -> None:
        """Everything that must hold, now and after the operation was asked for again."""
        if self.errors and operation.mends:
            operation.again()
        self.agreed(operation)
        if self.with_fsck:
            scene.fsck()
        for guest in self.guests:
            guest.check()
        operation.judge()
        operation.again()
        self.agreed(operation)

    def agreed(self, operation: Operation) -> None:
        until("settled", scene.settled)
        until("agreement", scene.agreement, 10)

        def agrees() -> bool:
            operation.agreement()
            return True

        until("agreement", agrees, 10)

    def recover(self, *, all_: bool = False) -> None:
        """After a point that didn't hold: all but the guests that run throughout goes, so that the next can be tried.

        What that doesn't mend is found again by the next point, as its own beginning.
        """
        keep = set() if all_ else {guest.name for guest in self.guests}
        with contextlib.suppress(Broken):
            until("the daemon", lambda: scene.call("Status"))
            for item in scene.call("List")["objects"]:
                if item["name"] not in keep:
                    for method in ("Stop", "Undefine"):
                        with contextlib.suppress(Refused, Gone):
                            scene.call(method, name=item["name"])
        for path in scene.temporary_files():
            os.unlink(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="inside")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, help="points of each operation; without it all of them")
    parser.add_argument("--operations", default="", help="names, with commas between; all without it")
    parser.add_argument("--errors", action="store_true", help="have the calls fail instead of killing the daemon")
    parser.add_argument("--no-fsck", action="store_true")
    args = parser.parse_args(argv)
    chosen = [*all_operations(), *other_operations(), *untidy_operations()]
    if args.operations:
        by_name = {operation.name: operation for operation in chosen}
        chosen = [by_name[name] for name in args.operations.split(",")]
    with scene.prepared():
        sweep = Sweep(args.seed, with_fsck=not args.no_fsck, errors=args.errors)
        for operation in chosen:
            sweep.run(operation, args.sample)
        sweep.recover(all_=True)
    failed = [point for point in sweep.points if point.problem]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
