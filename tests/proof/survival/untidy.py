# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events on a host that isn't tidy: others change what virtd has made, and a guest stands still by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.live.networks import begin, finish
from tests.proof.survival.networks import FRAIL, GUEST

if TYPE_CHECKING:
    from tests.proof.survival.scene import Scene

STILL, PLACE = "still", "/srv/still"
FILL = "dd if=/dev/urandom of=/dev/vda bs=64k count=128 conv=fsync 2>/dev/null"


def meddled_with(scene: Scene) -> None:
    """A bridge goes, and a running guest's port is taken out of another, under a daemon that isn't there.

    What is struck goes besides: dnsmasq, and the rules. The guest's stream stands still until its port is back.
    """
    scene.sh("systemctl stop virtd.socket virtd-root.socket virtd.service")
    scene.sh("sleep 1")
    scene.strike(gap=True)
    scene.sh(f"ip link del vd-{FRAIL}; ip link set vt-{GUEST}-0 nomaster; sleep 1")
    scene.sh("systemctl start virtd.socket virtd-root.socket virtd.service")
    there = f"test -e /sys/class/net/vd-{FRAIL} && test -e /sys/class/net/vt-{GUEST}-0/master && echo yes"
    scene.expect("bridge and port", lambda: scene.sh(there, check=False), 30)


def stands_still(scene: Scene) -> None:
    """A guest's disk is full; it says so to the next daemons, isn't resumed in vain, and goes on with room."""
    lab = scene.lab
    scene.sh(f"mkdir -p {PLACE}; mount -t tmpfs -o size=4M,mode=711 still {PLACE}; truncate -s 8M {PLACE}/d.img")
    try:
        lab.define(STILL, more=f'[[disk]]\npath = "{PLACE}/d.img"\nformat = "raw"\n', start=True)
        lab.wait_ready(STILL, timeout=120)
        before = begin(lab, STILL, FILL)

        def told() -> bool:
            fault = lab.info(STILL)["standstill"] or {}
            return fault.get("disk") == "disk[0]" and any(
                " free" in one["text"] for one in scene.status()["problems"]
            )

        scene.expect("the standstill", told, 60)
        old = scene.daemon()
        scene.sh(f"kill -STOP {old}")
        scene.strike()
        scene.sh(f"systemctl restart --no-block virtd.service; kill -CONT {old}; systemctl restart virtd.service")
        scene.expect("the standstill after a restart", told, 60)
        old = scene.daemon()
        scene.sh(f"kill -9 {old}")
        scene.await_new_daemon(old)
        scene.expect("the standstill after SIGKILL", told, 60)
        if lab.virtdctl("resume", STILL, check=False).returncode != 1 or lab.info(STILL)["state"] != "paused":
            scene.failed("it was resumed though its disk is full")
        scene.sh(f"mount -o remount,size=16M {PLACE}")
        lab.virtdctl("resume", STILL)
        if finish(lab, STILL, before, 120)[0]:
            scene.failed("what the guest wrote is lost")
    finally:
        lab.virtdctl("stop", STILL, check=False)
        lab.virtdctl("undefine", STILL, check=False)
        lab.forget_log(STILL)
        scene.sh(f"umount {PLACE}; rmdir {PLACE}", check=False)
