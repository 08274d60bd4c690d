# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the demo, the live tests and the benchmarks share: a lab to run commands in, a checker for its lines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

TOP = Path(__file__).resolve().parent.parent
LAB = str(TOP / "tests/lab/lab")

# A limit is there for what never comes. On a machine with other things to do all takes its time.
PATIENCE = 3

_LINE = re.compile(rb"line (\d{10}) ([a-z]{60}) \.\r?")
_ALPHABET = b"abcdefghijklmnopqrstuvwxyz"


_NETWORK_STATE = r"""
for i in BRIDGE PORT; do
    ip link show $i; ip -o addr show $i; bridge -d link show dev $i
    cat /sys/class/net/$i/bridge/stp_state /sys/class/net/$i/bridge/forward_delay
    bridge fdb show dev $i | grep static
    for f in ipv4 ipv6; do
        cd /proc/sys/net/$f/conf/$i
        grep . accept_ra addr_gen_mode arp_ignore autoconf disable_ipv6 forwarding rp_filter
    done
done 2>/dev/null | sed 's/^ *[0-9]*: //; s/ tentative//; s/valid_lft.*//; s/^[0-9]*:/-:/'
{ ip route; ip -6 route; } | sed 's/ linkdown//' | sort; ip rule
cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding
"""


def network_state(bridge: str, port: str) -> str:
    """A shell script that prints all that virtd has made of the kernel's for a bridge and its port, but counters."""
    return _NETWORK_STATE.replace("BRIDGE PORT", f"{bridge} {port}")


def expected(number: int) -> bytes:
    """The text of the guest's numbered line (see tests/lab/guest/console.c), so that a cut or mixed one is seen."""
    start = number % 26
    return (_ALPHABET * 4)[start : start + 60]


@dataclass
class Tally:
    """What a stream of numbered lines held."""

    lines: int = 0
    first: int = 0
    last: int = 0
    lost: int = 0
    repeated: int = 0
    broken: list[bytes] = field(default_factory=list)
    words: list[bytes] = field(default_factory=list)  # every other line

    @property
    def whole(self) -> bool:
        return not (self.lost or self.repeated or self.broken)


class Checker:
    """Takes a stream in pieces and counts lines lost and repeated. The last, unfinished line waits for its end."""

    def __init__(self, *, anywhere: bool = False) -> None:
        self.tally = Tally()
        self._rest = b""
        self._beginning = anywhere  # the stream may begin in the middle of a line, and does so here

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line.rstrip(b"\r"))

    def _take(self, line: bytes) -> None:
        tally = self.tally
        beginning, self._beginning = self._beginning, False
        match = _LINE.fullmatch(line)
        if match is None:
            if not (line.startswith(b"line ") or line.endswith(b" .")):
                tally.words.append(line)
            # Only the end of a numbered line may come first, and only that is passed over: what begins with a whole
            # line may begin with the answer that somebody waits for.
            elif not beginning or line.startswith(b"line "):
                tally.broken.append(line)
            return
        number = int(match[1])
        if match[2] != expected(number):
            tally.broken.append(line)
        tally.lines += 1
        if not tally.first:
            tally.first = number
        elif number > tally.last + 1:
            tally.lost += number - tally.last - 1
        elif number <= tally.last:
            tally.repeated += 1
        tally.last = max(tally.last, number)


def check(data: bytes) -> Tally:
    """The tally of a whole log."""
    checker = Checker()
    checker.feed(data)
    return checker.tally


class Failed(Exception):
    """A command in the lab failed; the message has what it said."""


@dataclass
class Lab:
    """A booted lab. Made by `up`; `down` leaves nothing."""

    name: str

    @classmethod
    def up(cls, name: str, *options: str, quiet: bool = False) -> Lab:
        subprocess.run(
            [LAB, "up", name, *options],
            check=True,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if quiet else None,
        )
        return cls(name)

    def down(self) -> None:
        subprocess.run([LAB, "down", self.name], check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def boot(self) -> None:
        """Boot it again after `systemctl poweroff` or `reboot` in it: everything is there but what was in /run."""
        subprocess.run([LAB, "boot", self.name], check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def soft_reboot(self) -> None:
        """Another user space below the same kernel, and wait until it is up. From systemd 254 on."""
        count = self.sh("systemctl show -P SoftRebootsCount").strip()
        self.sh("systemctl soft-reboot", check=False)

        def again() -> bool:
            # One that asks at the wrong moment is stopped with everything else, before it is killed.
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = self.sh(
                    "systemctl show -P SoftRebootsCount; systemctl is-system-running; true", check=False, timeout=5
                ).split()
                return len(said) == 2 and said[0] != count and said[1] in ("running", "degraded")
            return False

        self.wait("the system after its soft reboot", again, 120)

    def copy(self, source: str | Path, target: str) -> None:
        """Copy a file of ours into the lab."""
        with open(source, "rb") as file:
            self._fill(target, file)

    def write(self, target: str, text: str) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(text.encode())
            file.seek(0)
            self._fill(target, file)

    def _fill(self, target: str, content: IO[bytes]) -> None:
        # Through the lab's own commands and not its directory: an ordinary user has sudo for them only.
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1"'
        subprocess.run([LAB, "exec", self.name, "--", "sh", "-c", script, "sh", target], check=True, stdin=content)

    def run(
        self, *command: str, check: bool = True, stdin: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the lab. Raises Failed with its words, unless `check` is off."""
        done = subprocess.run(
            [LAB, "exec", self.name, "--", *command],
            check=False, capture_output=True, text=True, input=stdin, timeout=timeout,
        )  # fmt: skip
        if check and done.returncode:
            raise Failed(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def sh(self, script: str, *, check: bool = True, timeout: float = 120) -> str:
        """Run a shell script in the lab: its output."""
        return self.run("sh", "-c", script, check=check, timeout=timeout).stdout

    def virtdctl(self, *arguments: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self.run("virtdctl", *arguments, check=check, stdin=stdin)

    def json(self, *arguments: str) -> Any:
        """What a reading command of virtdctl answers."""
        return json.loads(self.virtdctl(*arguments, "--json").stdout)

    def info(self, domain: str) -> dict[str, Any]:
        value: dict[str, Any] = self.json("info", domain)
        return value

    def define(
        self, name: str, *, memory: str = "96M", cmdline: str = "", more: str = "", start: bool = False
    ) -> None:
        """Define one of the lab's own guests; `cmdline` is added to what its console needs."""
        self.virtdctl("define", "-", stdin=definition(name, memory=memory, cmdline=cmdline, more=more))
        if start:
            self.virtdctl("start", name)

    def undefine_all(self) -> None:
        """Stop and forget every domain, container and network, for the next test."""
        domains, networks, containers = self.sh(
            "set -e; systemctl start virtd; virtdctl list --json; printf '\\0'; virtdctl network list --json; "
            "printf '\\0'; ls /etc/virtd/lxc 2>/dev/null || true"
        ).split("\0")
        script = ""
        for item in json.loads(domains):
            script += f"virtdctl stop {item['name']}; virtdctl undefine {item['name']}\n"
        for file in containers.split():
            name = shlex.quote(file.removesuffix(".toml"))
            script += f"virtdctl container stop {name}; virtdctl container undefine {name}\n"
        for item in json.loads(networks):
            script += f"virtdctl network stop --force {item['name']}; virtdctl network undefine {item['name']}\n"
        if script:
            self.sh(script, check=False, timeout=600)

    def console(self, domain: str, *, noun: str = "") -> bytes:
        """The whole console log, backups included, oldest first."""
        command = ["virtdctl", *([noun] if noun else []), "log", domain]
        done = subprocess.run([LAB, "exec", self.name, "--", *command], check=False, capture_output=True, timeout=120)
        if done.returncode:
            raise Failed(f"{' '.join(command)}: {done.stderr.decode()}")
        return done.stdout

    def slots(self) -> int:
        """Descriptors in virtd's FD store, as PID 1 counts them."""
        return int(self.sh("systemctl show -P NFileDescriptorStore virtd.service"))

    def main_pid(self) -> int:
        return int(self.sh("systemctl show -P MainPID virtd.service"))

    def wait(self, what: str, condition: Any, timeout: float = 30) -> Any:
        """Call `condition` until it is true; its value. Failed after `timeout` seconds of an idle machine's."""
        timeout *= PATIENCE
        deadline, pause = time.monotonic() + timeout, 0.05
        while True:
            if value := condition():
                return value
            if time.monotonic() > deadline:
                raise Failed(f"{what} did not come about within {timeout:g} s")
            time.sleep(pause)
            # To ask takes longer than that, of the processor's time that what is waited for needs.
            pause = min(0.4, pause * 1.2)

    def wait_ready(self, domain: str, boots: int = 1, timeout: float = 180) -> None:
        """Until the guest has booted as far as its console program, `boots` times in this log.

        Looked for by one command in the lab: a guest that boots needs the processor more than `virtdctl log` does.
        """
        ready = f"cat /var/log/virtd/qemu/{domain}.console.log* 2>/dev/null | grep -ac 'virtd-lab ready'"
        script = f"until [ $({ready}) -ge {boots} ]; do sleep 0.1; done"
        timeout *= PATIENCE
        if self.run("timeout", f"{timeout:g}", "sh", "-c", script, check=False, timeout=timeout + 60).returncode:
            raise Failed(f"{domain}'s boot did not come about within {timeout:g} s")

    def wait_lines(self, domain: str, more_than: int = 20, timeout: float = 180) -> None:
        """Until the guest has booted, and said more than so many numbered lines."""
        self.wait_ready(domain, timeout=timeout)
        self.wait(f"{domain}'s lines", lambda: check(self.console(domain)).lines > more_than, timeout)

    def forget_log(self, domain: str) -> None:
        """Remove a stopped domain's console log, so that the next start begins with an empty one."""
        self.sh(f"rm -f /var/log/virtd/qemu/{domain}.console.log*")


def definition(name: str, *, memory: str = "96M", cmdline: str = "", more: str = "") -> str:
    """One of the lab's guests, as a person would write it.

    Its kernel doesn't check its timer: where the processor is busy enough it finds none, and panics.
    """
    return f"""name = "{name}"
memory = "{memory}"
{more if not more.lstrip().startswith("[") else ""}
[boot]
kernel = "/usr/share/virtd-lab/vmlinuz"
initrd = "/usr/share/virtd-lab/initramfs.gz"
cmdline = "console=ttyS0 quiet no_timer_check {cmdline}"
{more if more.lstrip().startswith("[") else ""}"""


class Attached:
    """A `virtdctl console` that stays attached: what it shows is checked as it comes, and words can be typed."""

    def __init__(self, lab: Lab, domain: str, *options: str, noun: str = "") -> None:
        self._process = subprocess.Popen(
            [LAB, "exec", lab.name, "--", "virtdctl", *([noun] if noun else []), "console", domain, *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._checker = Checker(anywhere=True)
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stdout: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        while data := os.read(stdout.fileno(), 1 << 16):
            with self._news:
                self._checker.feed(data)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def tally(self) -> Tally:
        with self._news:
            return self._checker.tally

    def type(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def ask(self, word: str, timeout: float = 60) -> bool:
        """Type `echo WORD`; whether the guest answered."""
        self.type(f"echo {word}\n")
        return self.heard(word, timeout)

    def heard(self, word: str, timeout: float = 60) -> bool:
        deadline = time.monotonic() + timeout
        with self._news:
            while word.encode() not in self._checker.tally.words:
                if (left := deadline - time.monotonic()) <= 0 or self._process.poll() is not None:
                    return word.encode() in self._checker.tally.words
                self._news.wait(min(left, 0.5))
        return True

    def forget(self, word: str) -> None:
        """Until it is heard again, `word` counts as not heard."""
        with self._news:
            words = self._checker.tally.words
            words[:] = [other for other in words if other != word.encode()]

    def close(self) -> str:
        """Detach; what it said on stderr."""
        if self._process.poll() is None:
            self._process.terminate()
            # A soft reboot of the lab stops the client before it is killed, and nsenter stops as its child does.
            self._process.send_signal(signal.SIGCONT)
        _, err = self._process.communicate(timeout=20) if not self._reader.is_alive() else (None, b"")
        self._reader.join(20)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None and not stream.closed:
                if stream is self._process.stderr:
                    err = stream.read() or b""
                stream.close()
        self._process.wait(20)
        return (err or b"").decode(errors="replace")


def build_rpm(version: str = "") -> Path:
    """`make rpm` for the lab; the file."""
    command = ["make", "-s", "-C", str(TOP), "rpm", "SITELIB=/usr/lib/python3/dist-packages"]
    if version:
        command.append(f"VERSION={version}")
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise Failed("make rpm failed")
    found = sorted(
        (TOP / "build/rpm").glob(f"virtd-{version or '*'}-*.noarch.rpm"), key=lambda path: path.stat().st_mtime
    )
    return found[-1]
