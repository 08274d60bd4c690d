# SPDX-License-Identifier: LGPL-2.1-or-later
"""So many children that their slots share entries of systemd's store: as safe as a few are.

They are guests in everything but QEMU, in whose place a small process runs (tests/children).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.children import SETTINGS, install
from tests.harness import Failed, check
from tests.live.tools import KILL, attached, drop_in, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Lab

pytestmark = pytest.mark.live

MANY = 150
PATIENCE = 600.0  # seconds, on a machine that does other things too
# 25 guests have slots of their own, and each box holds those of 25 more.
ENTRIES = 125 + 5
DEFINE = """
for n in $(seq 0 %d); do
    cat >/etc/virtd/qemu/$(printf child%%03d $n).toml <<END
name = "$(printf child%%03d $n)"
memory = "1M"
rng = false
[boot]
kernel = "/usr/share/virtd-lab/vmlinuz"
cmdline = "virtd.rate=4"
END
done
virtdctl reload >/dev/null
""" % (MANY + 1)  # noqa: UP031


@pytest.fixture
def children(lab: Lab) -> Iterator[Lab]:
    """MANY of them, running; two more are only defined."""
    install(lab)
    with settings(lab, SETTINGS):
        lab.sh(DEFINE, timeout=PATIENCE)
        try:
            start(lab, names())
            yield lab
        finally:
            everything = " ".join([*names(), f"child{MANY:03d}", f"child{MANY + 1:03d}"])
            lab.sh(f"printf '%s\\n' {everything} | xargs -n 8 -P 6 virtdctl stop", check=False, timeout=PATIENCE)
            lab.sh(f"virtdctl undefine {everything}", check=False, timeout=PATIENCE)


def names() -> list[str]:
    return [f"child{number:03d}" for number in range(MANY)]


def start(lab: Lab, which: list[str]) -> None:
    lab.sh(f"printf '%s\\n' {' '.join(which)} | xargs -n 5 -P 6 virtdctl start", timeout=PATIENCE)


def states(lab: Lab) -> dict[str, tuple[str, int | None]]:
    return {item["name"]: (item["state"], item["pid"]) for item in lab.json("list")}


def connected(lab: Lab) -> None:
    """Until the daemon has compared everything with systemd, and found nothing wrong."""
    found = lab.wait("the recovery", lambda: lab.virtdctl("fsck", "--json", check=False).stdout, 60)
    assert json.loads(found)["differences"] == []


def logs(lab: Lab) -> dict[str, bytes]:
    """Every child's console log."""
    text = lab.sh("cd /var/log/virtd/qemu && tail -n +1 -- child*.console.log")
    parts = re.split(r"(?:^|\n)==> (child\d+)\.console\.log <==\n", text)
    return {name: content.encode() for name, content in zip(parts[1::2], parts[2::2], strict=True)}


def whole(lab: Lab, before: dict[str, int]) -> dict[str, int]:
    """No line is missing, repeated or cut in any log, and each is longer than before; how many lines there are."""
    found = {}
    for name, content in logs(lab).items():
        tally = check(content.rpartition(b"\n")[0] + b"\n")
        assert tally.whole, (name, tally)
        assert tally.first in (0, 1), (name, tally)
        found[name] = tally.lines
    assert found.keys() == set(names())
    assert all(found[name] > before.get(name, -1) for name in found), (found, before)
    return found


def test_many_children_live_through_everything(children: Lab) -> None:
    lab = children
    running: dict[str, Any] = states(lab)
    assert sum(state == "running" for state, _ in running.values()) == MANY
    # A start looks for room before it has any, so with many at once some more may be in boxes than need be.
    assert lab.json("status")["budget"]["used"] == 5 * MANY
    assert lab.slots() <= ENTRIES + 1
    kept = {row["name"]: row["kept_as"] for row in lab.json("slots")}
    assert len(kept) == 5 * MANY
    assert len(set(kept.values())) == lab.slots()
    assert set(kept.values()) == set(re.findall(r"(?m)^(\S+/\S+)", lab.sh("systemd-analyze fdstore virtd.service")))
    lines = whole(lab, {})

    lab.sh("systemctl restart virtd.service")
    assert states(lab) == running
    connected(lab)
    for _ in range(3):
        lab.sh(KILL)
        assert states(lab) == running
    connected(lab)
    lines = whole(lab, lines)

    # While nobody is there some end: of those with slots of their own, and of those in boxes.
    alone = [name for name in names() if kept[f"qemu/{name}/stdin"].startswith("qemu/")]
    boxed = [name for name in names() if name not in alone]
    gone = [*alone[:5], *boxed[:3], *boxed[-3:]]
    lab.sh("systemctl stop virtd.socket virtd.service")
    lab.sh("".join(f"systemctl kill -s KILL virtd-qemu-{name}.service\n" for name in gone))
    lab.sh("systemctl start virtd.socket virtd.service")
    connected(lab)
    after = states(lab)
    for name, (state, pid) in running.items():
        assert after[name] == (("crashed", None) if name in gone else (state, pid)), name
    assert {lab.info(name)["exit"]["cause"] for name in gone[::5]} == {lab.info(gone[0])["exit"]["cause"]}
    lab.wait("their slots dropped", lambda: lab.json("status")["budget"]["used"] == 5 * (MANY - len(gone)), 30)
    # What they said last is there, the others went on, and both kinds of consoles still take input.
    for name in (alone[-1], boxed[5]):
        with attached(lab, name) as console:
            assert console.ask("the-right-pipe")
    start(lab, gone)
    lab.sh(KILL)
    assert {name: state for name, (state, _) in states(lab).items() if name in running} == {
        name: state for name, (state, _) in running.items()
    }
    connected(lab)
    one_too_many(lab)


def one_too_many(lab: Lab) -> None:
    """It is refused and told what to raise: a box would fit, but not the entry that its next generation needs."""
    used, entries = 5 * MANY, lab.slots()
    last, late = f"child{MANY:03d}", f"child{MANY + 1:03d}"
    with drop_in(lab, f"[Service]\nFileDescriptorStoreMax={entries + 1}\n"):
        while (budget := lab.json("status")["budget"])["used"] + 5 <= budget["max"]:
            # Room that is left in a box, when the starts came in another order.
            lab.virtdctl("start", last)
            used += 5
            last = late
        done = lab.virtdctl("start", late, check=False)
        assert done.returncode == 1
        assert f"{used} slots are used, and FileDescriptorStoreMax allows" in done.stderr
        assert "set a higher FileDescriptorStoreMax= in the unit" in done.stderr
        # Within the boxes that there are, one may still come for another that goes.
        lab.virtdctl("stop", "child149")
        lab.virtdctl("start", "child149")
        lab.sh(KILL)
        assert lab.info("child149")["state"] == "running"
    lab.virtdctl("start", late)
    with pytest.raises(Failed):
        lab.virtdctl("slots", "nobody")
