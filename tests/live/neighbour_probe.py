# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a QEMU that its guest has taken over would try: run with the properties of guest A's unit, against guest B.

Its argument is JSON: B's `pid`, `uid`, `runtime`, `disk` and `tap`, and the `key` of somebody's SysV shared memory.
It prints, as JSON, each try and whether it worked. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)
B: dict[str, Any] = json.loads(sys.argv[1])
PID: int = B["pid"]
TRIES: dict[str, Callable[[], object]] = {}
PIDFD_GETFD, KEYCTL, IO_URING_SETUP, BPF, USERFAULTFD, PERF_EVENT_OPEN = 438, 250, 425, 321, 323, 298  # x86-64


def attempt(function: Callable[[], object]) -> Callable[[], object]:
    """One try: it works unless it raises OSError, or returns False."""
    TRIES[function.__name__] = function
    return function


def call(function: Any, *arguments: Any) -> int:
    """A C function whose failure is -1."""
    result = int(function(*arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# B's process


@attempt
def see_its_process() -> bool:
    """Its own PID namespace may have the number for one of ours."""
    return (
        any(os.stat(f"/proc/{entry}").st_uid == B["uid"] for entry in os.listdir("/proc") if entry.isdecimal())
        or b"qemu" in open(f"/proc/{PID}/cmdline", "rb").read()
    )


@attempt
def read_its_memory() -> None:
    os.close(os.open(f"/proc/{PID}/mem", os.O_RDWR))


@attempt
def read_its_memory_by_a_call() -> int:
    class Part(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))

    buffer = ctypes.create_string_buffer(8)
    with open(f"/proc/{PID}/maps", encoding="ascii") as maps:
        start = int(next(line for line in maps if " r" in line).partition("-")[0], 16)
    ours, theirs = Part(ctypes.addressof(buffer), 8), Part(start, 8)
    return call(LIBC.process_vm_readv, PID, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)


@attempt
def attach_by_ptrace() -> None:
    call(LIBC.ptrace, 16, PID, 0, 0)
    LIBC.ptrace(17, PID, 0, 0)


@attempt
def read_its_environment() -> bytes:
    with open(f"/proc/{PID}/environ", "rb") as file:
        return file.read()


@attempt
def list_its_descriptors() -> list[str]:
    return [os.readlink(f"/proc/{PID}/fd/{number}") for number in os.listdir(f"/proc/{PID}/fd")]


@attempt
def take_one_of_its_descriptors() -> None:
    pidfd = os.pidfd_open(PID)
    call(LIBC.syscall, PIDFD_GETFD, pidfd, 0, 0)


@attempt
def enter_its_root() -> list[str]:
    return os.listdir(f"/proc/{PID}/root/run/virtd/qemu")


@attempt
def speak_qmp_through_its_root() -> None:
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(f"/proc/{PID}/root{B['runtime']}/shutdown.sock")


@attempt
def signal_it() -> None:
    os.kill(PID, 0)


@attempt
def signal_it_by_a_pidfd() -> None:
    signal.pidfd_send_signal(os.pidfd_open(PID), 0)


@attempt
def change_its_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, PID, 19)


@attempt
def choose_its_cpus() -> None:
    os.sched_setaffinity(PID, {0})


@attempt
def change_its_limits() -> None:
    import resource

    resource.prlimit(PID, resource.RLIMIT_CORE, (0, 0))


@attempt
def have_it_killed_first() -> None:
    with open(f"/proc/{PID}/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


# B's files


@attempt
def open_its_disk() -> None:
    os.close(os.open(B["disk"], os.O_RDONLY))


@attempt
def open_its_disk_through_its_root() -> None:
    os.close(os.open(f"/proc/{PID}/root{B['disk']}", os.O_RDONLY))


@attempt
def look_into_its_directory() -> list[str]:
    return os.listdir(B["runtime"])


@attempt
def speak_qmp() -> None:
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(f"{B['runtime']}/qmp.sock")


@attempt
def read_its_record() -> bytes:
    with open(f"{B['runtime']}.json", "rb") as file:
        return file.read()


@attempt
def read_its_console() -> bytes:
    with open(f"/var/log/virtd/qemu/{os.path.basename(B['runtime'])}.console.log", "rb") as file:
        return file.read()


@attempt
def type_on_its_console() -> None:
    os.close(os.open(f"/run/virtd/fifos/qemu.{os.path.basename(B['runtime'])}/stdin", os.O_WRONLY | os.O_NONBLOCK))


@attempt
def take_its_tap() -> None:
    """EBUSY would say that it is ours to take once B has let go of it."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(fd, 0x400454CA, struct.pack("=16sH22x", B["tap"].encode(), 0x0002 | 0x1000 | 0x4000))
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
    finally:
        os.close(fd)


# What guests could have in common


@attempt
def find_somebodys_shared_memory() -> None:
    call(LIBC.shmget, B["key"], 0, 0)


@attempt
def connect_to_an_abstract_socket() -> None:
    """Of the host's network namespace, which QEMU needs for its tap; so there must be none that helps."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
        names = {line.split()[-1] for line in file if " @" in line}
    if any("virtd" in name or "qemu" in name for name in names):
        return
    raise OSError(errno.ENOENT, "no such socket")


@attempt
def use_a_keyring() -> None:
    call(LIBC.syscall, KEYCTL, 0, -4, 1, 0, 0)  # KEYCTL_GET_KEYRING_ID of KEY_SPEC_USER_KEYRING


# The way up


@attempt
def become_root_by_a_setuid_program() -> bool:
    done = subprocess.run(["/usr/bin/su", "-c", "id -u"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode == 0


@attempt
def gain_privileges() -> bool:
    with open("/proc/self/status", encoding="ascii") as file:
        status = dict(line.rstrip().split(":\t", 1) for line in file if ":\t" in line)
    caps = any(int(status[key], 16) for key in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"))
    return caps or status["NoNewPrivs"] != "1" or status["Seccomp"] != "2"


@attempt
def become_another() -> None:
    os.setresuid(B["uid"], B["uid"], B["uid"])


@attempt
def make_a_user_namespace() -> None:
    call(LIBC.unshare, 0x10000000)


@attempt
def make_a_mount_namespace() -> None:
    call(LIBC.unshare, 0x00020000)


@attempt
def mount_something() -> None:
    call(LIBC.mount, b"none", b"/tmp", b"tmpfs", 0, None)


@attempt
def write_to_its_control_group() -> None:
    with open("/proc/self/cgroup", encoding="ascii") as file:
        group = file.read().strip().splitlines()[-1].rpartition("::")[2] or "/"
    with open(f"/sys/fs/cgroup{group}/cgroup.procs", "w", encoding="ascii") as file:
        file.write(str(os.getpid()))


@attempt
def speak_to_the_host() -> None:
    for path in (
        "/run/dbus/system_bus_socket",
        "/run/systemd/private",
        "/run/virtd/virtd.sock",
        "/run/systemd/notify",
    ):
        try:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(path)
        except OSError:
            continue
        return
    raise OSError(errno.ENOENT, "none of them")


def _socket(family: int, kind: int) -> None:
    socket.socket(family, kind).close()


@attempt
def make_an_ip_socket() -> None:
    _socket(socket.AF_INET, socket.SOCK_STREAM)


@attempt
def make_a_packet_socket() -> None:
    _socket(socket.AF_PACKET, socket.SOCK_RAW)


@attempt
def make_a_netlink_socket() -> None:
    _socket(socket.AF_NETLINK, socket.SOCK_RAW)


@attempt
def make_a_vsock() -> None:
    _socket(socket.AF_VSOCK, socket.SOCK_STREAM)


@attempt
def use_io_uring() -> None:
    call(LIBC.syscall, IO_URING_SETUP, 1, ctypes.create_string_buffer(256))


@attempt
def use_bpf() -> None:
    call(LIBC.syscall, BPF, 0, ctypes.create_string_buffer(64), 64)


@attempt
def use_perf() -> None:
    call(LIBC.syscall, PERF_EVENT_OPEN, ctypes.create_string_buffer(128), 0, -1, -1, 0)


@attempt
def use_userfaultfd() -> None:
    call(LIBC.syscall, USERFAULTFD, 0)


@attempt
def write_to_the_host() -> None:
    for path in (
        "/usr/probe",
        "/etc/probe",
        "/var/probe",
        "/probe",
        "/sys/kernel/probe",
        "/proc/sys/kernel/hostname",
    ):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
        except OSError:
            continue
        return
    raise OSError(errno.EROFS, "none of them")


@attempt
def open_a_device() -> None:
    for path in ("/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/loop0", "/dev/loop-control", "/dev/fuse"):
        try:
            os.close(os.open(path, os.O_RDONLY))
        except OSError:
            continue
        return
    raise OSError(errno.ENOENT, "none of them")


def main() -> None:
    results = {}
    for name, function in TRIES.items():
        try:
            results[name] = function() is not False
        except (OSError, StopIteration):
            results[name] = False
    print(json.dumps(results))


main()
