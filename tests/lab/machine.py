# SPDX-License-Identifier: LGPL-2.1-or-later
"""One lab's life: overlay, boot under systemd-nspawn, and the end, which leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import cgroups, enter, root
from .paths import CHECKOUT, Lab
from .say import run, say
from .state import LabError, leader_of, read_state, recorded, start_time, write_state
from .suites import Suite

_BOOT_SECONDS = 90.0


class _Gone(LabError):
    """Another command has removed the lab meanwhile."""


@contextlib.contextmanager
def _held(lab: Lab) -> Iterator[None]:
    """Holds the lab's directory against another `up` or `down`; however this process ends, the kernel lets go."""
    gone = _Gone(f"another command has just removed lab {lab.name}")
    try:
        descriptor = os.open(lab.dir, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise gone from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another command is at work on lab {lab.name}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Whoever had it before may have removed the directory, and a new one of that name is not the one held here.
        if not lab.dir.exists() or not os.path.samestat(os.fstat(descriptor), lab.dir.stat()):
            raise gone
        yield
    finally:
        os.close(descriptor)


def up(name: str, suite: Suite, rpms: Sequence[Path], virtd: bool) -> Lab:
    """Makes and boots a lab and, unless `virtd` is False, installs the given or the newest built RPMs in it.

    When anything fails, the lab is cleared away again and LabError says why.
    """
    lab = Lab(name)
    packages = _packages(rpms) if virtd else []
    base = root.cached_root(suite)
    lab.dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        lab.dir.mkdir()
    except FileExistsError:
        with _held(lab):
            if is_up(lab):
                raise LabError(f"lab {name} is up already; lab down {name} ends it") from None
            say(f"clearing away what an earlier lab {name} left")
            _clear(lab)
        lab.dir.mkdir()
    with _held(lab):
        try:
            _boot(lab, suite, base)
            if packages:
                _install(lab, packages)
            _note(lab, ready=1)
        except BaseException:
            say(f"lab {name} failed; clearing it away")
            _clear(lab)
            raise
    return lab


def boot(name: str) -> None:
    """Boots a lab that was shut down from inside: another boot of the same system. LabError if it runs."""
    lab = Lab(name)
    if not lab.root.exists():
        raise LabError(f"there is no lab {name}; lab up {name} makes it")
    with _held(lab):
        if is_up(lab):
            raise LabError(f"lab {name} is up; run systemctl poweroff or reboot in it first")
        state = read_state(str(lab.dir))
        if supervisor := recorded(state, "supervisor"):
            _await_end(supervisor, state["supervisor_start"], 30.0)
        _start(lab)


def _note(lab: Lab, **changes: object) -> None:
    write_state(str(lab.dir), changes)


def is_up(lab: Lab) -> bool:
    """True while the lab's PID 1 runs."""
    try:
        return leader_of(lab.name) > 0
    except LabError:
        return False


def down(name: str) -> bool:
    """Ends a lab and removes all of it, in whatever condition it is. False when there was none."""
    lab = Lab(name)
    if not lab.dir.exists():
        _clear(lab)
        return False
    try:
        with _held(lab):
            _clear(lab)
    except _Gone:
        return False
    say(f"lab {name} is gone")
    return True


def _packages(rpms: Sequence[Path]) -> list[Path]:
    """The files asked for, or the last built RPM of the version that the checkout says it is."""
    found = list(rpms)
    if not found:
        match = re.search(r'^__version__ = "(.+)"', (CHECKOUT / "virtd/__init__.py").read_text(), re.MULTILINE)
        pattern = f"virtd-{match[1] if match else '*'}-*.noarch.rpm"
        found = sorted((CHECKOUT / "build/rpm").glob(pattern), key=lambda path: path.stat().st_mtime)[-1:]
    if not found:
        raise LabError("there is no virtd RPM in build/rpm: run make rpm, or give --rpm FILE or --no-virtd")
    for path in found:
        if not path.is_file():
            raise LabError(f"{path} does not exist")
    return found


def _boot(lab: Lab, suite: Suite, base: Path) -> None:
    _note(lab, suite=suite.name, root=str(base), created=time.time())
    for directory in (lab.upper, lab.work, lab.root):
        directory.mkdir()
    options = f"lowerdir={base},upperdir={lab.upper},workdir={lab.work}"
    run(["mount", "-t", "overlay", lab.machine, "-o", options, lab.root], what="mounting the lab's overlay")
    (lab.root / "etc/hostname").write_text(f"{lab.name}\n")
    (lab.root / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {lab.name}\n::1 localhost\n")
    # As udev makes it. The host's own may be root's alone, where no udev runs.
    (lab.root / "etc/tmpfiles.d/virtd-lab.conf").write_text("c! /dev/net/tun 0666 root root - 10:200\n")
    (lab.root / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
    say(f"booting lab {lab.name} ({suite.name}, systemd {suite.systemd})")
    _start(lab)


def _start(lab: Lab) -> None:
    address = lab.dir / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(address))
        child = _start_nspawn(lab, address)
        _await_ready(lab, notify, child)
    address.unlink()
    said = enter_output(lab, ["systemctl", "is-system-running"])
    if said != "running":
        failed = enter_output(lab, ["systemctl", "list-units", "--failed", "--plain", "--no-legend"])
        say(f"lab {lab.name} is {said}; failed units: {failed or 'none'}")
    say(f"lab {lab.name} is booted")


def _nspawn(lab: Lab) -> list[str]:
    argv = ["systemd-nspawn", "--quiet", "--boot", f"--directory={lab.root}", f"--machine={lab.machine}"]
    argv += [f"--hostname={lab.name}", "--register=no", "--keep-unit", "--private-network", "--notify-ready=yes"]
    argv += ["--console=read-only", "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--settings=no"]
    # virtd's guests and networks need TUN, mounts and BPF, as they would have them on a real machine.
    argv += ["--capability=all", "--system-call-filter=@mount @keyring bpf"]
    # What systemd gives its services on a real machine; the host's own hard limit may be far lower.
    argv += ["--rlimit=NOFILE=1024:524288"]
    return argv


def _start_nspawn(lab: Lab, notify: Path) -> subprocess.Popen[bytes] | None:
    """Starts nspawn in a control group of its own. The process is returned where no systemd of the host owns it."""
    environment = {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "NOTIFY_SOCKET": str(notify),
        "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
        "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
    }
    if cgroups.host_has_systemd():
        unit = f"{lab.machine}.service"
        argv = ["systemd-run", "--quiet", "--collect", f"--unit={unit}"]
        argv += ["--property=Delegate=yes", "--property=KillMode=mixed", "--property=LimitNOFILE=524288"]
        argv += [f"--property=StandardOutput=append:{lab.console}", "--property=StandardError=inherit"]
        argv += [f"--setenv={name}={value}" for name, value in environment.items() if name != "PATH"]
        run([*argv, "--", *_nspawn(lab)], what="starting the lab's unit", timeout=60)
        show = ["systemctl", "show", "--value", "--property=ControlGroup", unit]
        _note(lab, cgroup=f"{cgroups.unified_mount()}{run(show, what='finding its group').strip()}")
        return None
    group_path = cgroups.expected(lab.machine)
    # Recorded first: a group that nobody knows of would be left behind.
    _note(lab, cgroup=str(group_path))
    group_path.mkdir(exist_ok=True)

    def join() -> None:
        (group_path / "cgroup.procs").write_text("0")

    with lab.console.open("ab") as console:
        return subprocess.Popen(
            _nspawn(lab),
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
            preexec_fn=join,
        )


def _await_ready(lab: Lab, notify: socket.socket, child: subprocess.Popen[bytes] | None) -> None:
    """Waits for nspawn to name the lab's PID 1, and for that to say that it has finished booting."""
    end = time.monotonic() + _BOOT_SECONDS
    notify.settimeout(0.25)
    while time.monotonic() < end:
        if child is not None and child.poll() is not None:
            raise LabError(f"systemd-nspawn ended with status {child.returncode}:\n{_tail(lab)}")
        try:
            message = notify.recv(4096).decode(errors="replace")
        except TimeoutError:
            continue
        fields = dict(line.partition("=")[::2] for line in message.splitlines())
        if leader := int(fields.get("X_NSPAWN_LEADER_PID", 0)):
            supervisor = _parent(leader)
            started = {"leader_start": start_time(leader), "supervisor_start": start_time(supervisor)}
            _note(lab, leader=leader, supervisor=supervisor, **started)
        if fields.get("READY") == "1":
            return
    raise LabError(f"lab {lab.name} had not finished booting after {_BOOT_SECONDS:.0f} s:\n{_tail(lab)}")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _tail(lab: Lab) -> str:
    try:
        lines = lab.console.read_text(errors="replace").splitlines()[-30:]
    except OSError:
        return "    (it left no console)"
    return "\n".join(f"    {line}" for line in lines)


def enter_output(lab: Lab, command: Sequence[str], check: bool = False) -> str:
    """What a command in the lab wrote, standard error included; LabError if it failed and `check` is True."""
    done = subprocess.run(
        enter.command_line(leader_of(lab.name), command),
        env=enter.environment(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: enter.join_cgroup(lab.name),
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    if check and done.returncode != 0:
        raise LabError(f"{' '.join(command)} ended with status {done.returncode} in lab {lab.name}:\n{done.stdout}")
    return done.stdout.strip()


def _install(lab: Lab, packages: Sequence[Path]) -> None:
    """rpm -i with the packages' own scriptlets, then the start that a person would do."""
    directory = lab.root / "var/cache/virtd-lab"
    directory.mkdir(parents=True, exist_ok=True)
    inside = []
    for package in packages:
        shutil.copy(package, directory / package.name)
        inside.append(f"/var/cache/virtd-lab/{package.name}")
    say(f"installing {', '.join(package.name for package in packages)}")
    said = enter_output(lab, ["rpm", "--install", "--verbose", *inside], check=True)
    for line in said.splitlines():
        say(f"  rpm: {line}")
    enter_output(lab, ["systemctl", "enable", "--now", "virtd.socket", "virtd.service"], check=True)
    say("virtd is running")


def _clear(lab: Lab) -> None:
    """Removes all that a lab can have left, in an order that works from any point at which `up` may have stopped."""
    state = read_state(str(lab.dir))
    group = Path(state.get("cgroup") or cgroups.expected(lab.machine))
    # The lab's own processes go first: nspawn then ends by itself and tidies up what it keeps on the host.
    left = cgroups.kill(group / "payload")
    if supervisor := recorded(state, "supervisor"):
        _await_end(supervisor, state["supervisor_start"], 3.0)
    if cgroups.host_has_systemd():
        for command in ("stop", "reset-failed"):
            argv = ["systemctl", "--quiet", command, f"{lab.machine}.service"]
            subprocess.run(argv, stderr=subprocess.DEVNULL, check=False)
    if left := left or cgroups.kill(group):
        raise LabError(f"processes of lab {lab.name} don't end: {' '.join(map(str, left))}")
    _unmount(lab)
    if group.exists():
        cgroups.remove(group)
    for mount in cgroups.mounts_of_all():
        if (mount / group.name).is_dir():
            cgroups.remove(mount / group.name)
    root.remove_tree(lab.dir)


def _await_end(pid: int, started: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while start_time(pid) == started and time.monotonic() < end:
        time.sleep(0.01)


def _unmount(lab: Lab) -> None:
    """Unmounts everything in the lab's directory, the deepest first; several may be stacked on one point."""
    prefix = f"{lab.dir.resolve()}/"
    for attempt in range(50):
        with open("/proc/self/mountinfo") as mounts:
            points = [line.split()[4] for line in mounts]
        inside = sorted((point for point in points if point.startswith(prefix)), key=len, reverse=True)
        if not inside:
            return
        for point in inside:
            # A namespace that is just being torn down can hold a mount for a moment; only then detach it lazily.
            subprocess.run(
                ["umount", *(["--lazy"] if attempt > 20 else []), point], stderr=subprocess.DEVNULL, check=False
            )
        time.sleep(0.02)
    raise LabError(f"{prefix} has mounts that cannot be unmounted")
