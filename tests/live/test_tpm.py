# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest with a TPM: what it is given, what survives what, and what is left in the end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.harness import definition
from tests.live.conftest import SUITE
from tests.live.networks import run

if TYPE_CHECKING:
    from tests.harness import Lab

pytestmark = pytest.mark.live

UNIT = "virtd-qemu-web1@tpm.service"
# A password session with an empty password (TCG, TPM 2.0 Library, part 3), and an index of the owner's of 8 bytes.
PASSWORD = "00000009400000090000010000"
OWNER, INDEX = "40000001", "01500001"
PUBLIC = f"{INDEX}000b0206000600000008"
SECRET = "76697274642d2121"
DEBUG_PCR = 16
# A storage key on P-256, of which the owner's seed always makes the same; and what is sealed by it.
STORAGE_KEY = "0023000b00030472000000060080004300100003001000000000"
SEALED = "0008000b00000452000000100000"


def command(code: str, body: str) -> str:
    """A command with one session, as hex."""
    return f"8002{(10 + len(body) // 2):08x}{code}{body}"


DEFINE = command("0000012a", f"{OWNER}{PASSWORD}0000{len(PUBLIC) // 2:04x}{PUBLIC}")
WRITE = command("00000137", f"{OWNER}{INDEX}{PASSWORD}0008{SECRET}0000")
READ = command("0000014e", f"{OWNER}{INDEX}{PASSWORD}00080000")
PRIMARY = command("00000131", f"{OWNER}{PASSWORD}000400000000{len(STORAGE_KEY) // 2:04x}{STORAGE_KEY}000000000000")
EXTEND = command("00000182", f"{DEBUG_PCR:08x}{PASSWORD}00000001000b{'ab' * 32}")


def ask(lab: Lab, sent: str) -> str:
    """Send a command to the guest's TPM; the answer as hex, if that is a success."""
    octal = "".join(f"\\{int(sent[at : at + 2], 16):03o}" for at in range(0, len(sent), 2))
    script = (
        f"exec 3<>/dev/tpm0; printf '{octal}' >&3; dd bs=4096 count=1 <&3 2>/dev/null | hexdump -v -e '1/1 \"%02x\"'"
    )
    answer = run(lab, "web1", script)[1].strip()
    assert answer[12:20] == "00000000", answer
    return answer


def seal(lab: Lab) -> str:
    """Seal the secret: what only this TPM opens."""
    key = ask(lab, PRIMARY)[20:28]
    secret = f"000c00000008{SECRET}"
    body = ask(lab, command("00000153", f"{key}{PASSWORD}{secret}{len(SEALED) // 2:04x}{SEALED}000000000000"))[28:]
    flush(lab, key)
    private = 4 + 2 * int(body[:4], 16)
    public = 4 + 2 * int(body[private : private + 4], 16)
    return body[: private + public]


def unsealed(lab: Lab, sealed: str) -> str:
    key = ask(lab, PRIMARY)[20:28]
    secret = ask(lab, command("00000157", f"{key}{PASSWORD}{sealed}"))[20:28]
    answer = ask(lab, command("0000015e", f"{secret}{PASSWORD}"))
    flush(lab, secret)
    flush(lab, key)
    return answer[32 : 32 + len(SECRET)]


def flush(lab: Lab, handle: str) -> None:
    ask(lab, f"80010000000e00000165{handle}")


def kept(lab: Lab, sealed: str) -> bool:
    """Whether it has what was stored in it, and opens what was sealed by it."""
    return SECRET in ask(lab, READ) and unsealed(lab, sealed) == SECRET


def pcr(lab: Lab) -> str:
    return run(lab, "web1", f"cat /sys/class/tpm/tpm0/pcr-sha256/{DEBUG_PCR}")[1].strip()


def start(lab: Lab, boots: int = 1) -> int:
    """Start it; the PID of its TPM."""
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1", boots)
    return int(lab.info("web1")["tpm"]["pid"])


def problems(lab: Lab) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(lab.virtdctl("status", "--json", check=False).stdout)["problems"]
    return found


def nothing_left(lab: Lab, state: str) -> None:
    assert lab.sh("systemctl list-units --all --plain --no-legend 'virtd-qemu-*'") == ""
    assert lab.sh("pgrep swtpm || true") == ""
    assert lab.sh(f"stat -c '%u %a' {state}").strip() == "0 700"
    assert lab.sh(f"stat -c '%u %a' {state}/*").split("\n")[0] == "0 600"
    assert lab.json("fsck")["differences"] == []
    assert problems(lab) == []


@pytest.mark.parametrize("model", ["crb", "tis"])
def test_tpm(lab: Lab, model: str) -> None:
    lab.forget_log("web1")
    lab.virtdctl("define", "-", stdin=definition("web1", more=f'[tpm]\nmodel = "{model}"\n'))
    pid = start(lab)
    info = lab.info("web1")
    state = info["tpm"]["state"]
    assert (info["tpm"]["unit"], info["tpm"]["model"]) == (UNIT, model)
    assert run(lab, "web1", "cat /sys/class/tpm/tpm0/tpm_version_major")[1].strip() == "2"
    driver = run(lab, "web1", "readlink /sys/class/tpm/tpm0/device/driver")[1].strip().rpartition("/")[2]
    assert driver == f"tpm_{model}"

    # It runs as the guest does, and sees what it keeps.
    user = lab.sh(f"stat -c %u /proc/{info['pid']}").strip()
    assert lab.sh(f"stat -c %u /proc/{pid} {state} {state}/*").split() == [user] * 3
    assert user != "0"
    hidden = "etc/passwd etc/virtd run/virtd home/* root/* srv/* var/log var/lib/*/*/*/*"
    assert lab.sh(f"cd /proc/{pid}/root; ls -d {hidden} 2>/dev/null", check=False).split() == [state[1:]]

    ask(lab, DEFINE)
    ask(lab, WRITE)
    sealed = seal(lab)
    zero = pcr(lab)
    ask(lab, EXTEND)
    measured = pcr(lab)
    assert measured != zero
    assert kept(lab, sealed)

    # The daemon comes and goes.
    kill, restart = "kill -9 $(systemctl show -P MainPID virtd)", "systemctl restart virtd"
    stop = "systemctl stop virtd.socket virtd; sleep 2"
    # systemd 252 drops the console's slots at a stop, and this test asks the guest on its console.
    for away in (kill, restart) if SUITE == "bookworm" else (kill, restart, stop):
        lab.sh(away)
        lab.sh("systemctl start virtd.socket virtd")
        assert (lab.info("web1")["pid"], lab.info("web1")["tpm"]["pid"]) == (info["pid"], pid)
        assert kept(lab, sealed)
        assert pcr(lab) == measured
    lab.sh("systemctl daemon-reexec; systemctl daemon-reload")
    assert kept(lab, sealed)
    assert lab.json("fsck")["differences"] == []
    assert problems(lab) == []

    # The guest is reset: what it has measured is forgotten, what it keeps isn't.
    lab.virtdctl("reboot", "--force", "web1")
    lab.wait_ready("web1", 2)
    assert lab.info("web1")["tpm"]["pid"] == pid
    assert pcr(lab) == zero
    assert kept(lab, sealed)

    # QEMU is killed while no daemon is there.
    lab.sh("systemctl stop virtd.socket virtd")
    lab.sh(f"systemctl kill -s KILL virtd-qemu-web1.service; while [ -d /proc/{pid} ]; do sleep 0.1; done")
    lab.sh("systemctl start virtd.socket virtd")
    lab.wait("its end", lambda: lab.info("web1")["state"] == "crashed")
    nothing_left(lab, state)

    # Another start has the same TPM, and undefining it loses nothing.
    uuid = lab.info("web1")["uuid"]
    assert start(lab, 3) != pid
    assert kept(lab, sealed)
    lab.virtdctl("stop", "web1")
    nothing_left(lab, state)
    lab.virtdctl("undefine", "web1")
    assert lab.sh(f"ls {state}/tpm2-00.permall")
    lab.virtdctl("define", "-", stdin=f'uuid = "{uuid}"\n' + definition("web1", more=f'[tpm]\nmodel = "{model}"\n'))
    start(lab, 4)
    assert kept(lab, sealed)
    lab.virtdctl("shutdown", "web1")
    nothing_left(lab, state)
    lab.virtdctl("undefine", "web1")
    lab.sh("rm -r /var/lib/virtd/qemu/web1")


def test_it_ends_before_the_guest(lab: Lab) -> None:
    """The guest runs on, and it is said; nobody starts another one for it."""
    lab.virtdctl("define", "-", stdin=definition("web1", more="[tpm]\n"))
    pid = start(lab)
    guest = lab.info("web1")["pid"]
    assert lab.run("systemctl", "restart", UNIT, check=False).returncode
    lab.sh(f"kill -9 {pid}")
    lab.wait("the problem", lambda: problems(lab))
    lab.sh("systemctl restart virtd")
    (problem,) = problems(lab)
    assert "Its TPM has ended" in problem["text"]
    assert UNIT in problem["hint"]
    assert (lab.info("web1")["pid"], lab.info("web1")["tpm"]["pid"]) == (guest, None)
    lab.virtdctl("stop", "web1")
    nothing_left(lab, "/var/lib/virtd/qemu/web1/*.tpm")
    assert start(lab) != pid
    assert problems(lab) == []
    lab.virtdctl("stop", "web1")
    lab.virtdctl("undefine", "web1")
    lab.sh("rm -r /var/lib/virtd/qemu/web1")


def test_without_swtpm(lab: Lab) -> None:
    lab.sh("mv /usr/bin/swtpm /usr/bin/swtpm.off")
    try:
        defined = lab.virtdctl("define", "-", stdin=definition("web1", more="[tpm]\n"))
        assert "swtpm, which emulates it, isn't installed" in defined.stderr
        said = lab.virtdctl("start", "web1", check=False)
        assert said.returncode != 0
        assert "tpm: swtpm, which emulates it, isn't installed" in said.stderr
        assert "Debian: swtpm" in said.stderr
    finally:
        lab.sh("mv /usr/bin/swtpm.off /usr/bin/swtpm")
    assert lab.json("fsck")["differences"] == []
    lab.virtdctl("undefine", "web1")
