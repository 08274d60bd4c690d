# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks on every bus, as the guest finds them: by serial number, at places that stay."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.harness import definition
from tests.live.networks import run
from tests.live.tools import KILL, acl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Lab

pytestmark = pytest.mark.live

HERE = "/srv/buses"
UUID = "0123abcd-4567-89ab-cdef-0123456789ab"
# By bus, in the order of the definition; NVMe's is virtd's own.
SERIALS = {
    "virtio": "SN-virtio",
    "scsi": "SN-scsi.0123456789+_",
    "sata": "SN_sata",
    "nvme": "0123456789ab-3",
}
LOAD = "while read -r m; do insmod /lib/modules/$m || exit 1; done </lib/modules/buses"
LOOK = (
    "cd /sys/block; for n in *; do case $n in vd*) s=$(cat $n/serial);; sd*) s=$(tail -c +5 $n/device/vpd_pg80);; "
    "nvme*) s=$(cat $n/device/serial);; *) continue;; esac; echo $n $s $(readlink -f $n/device); done"
)


def text() -> str:
    tables = "".join(
        f'[[disk]]\npath = "{HERE}/{bus}"\nbus = "{bus}"\n' + (f'serial = "{serial}"\n' if bus != "nvme" else "")
        for bus, serial in SERIALS.items()
    )
    return f'uuid = "{UUID}"\n' + definition("web1", more=tables)


def start(lab: Lab, *serials: str) -> dict[str, tuple[str, str]]:
    """Start the guest; the name and the place in sysfs of each disk, by its serial number."""
    lab.forget_log("web1")
    lab.virtdctl("start", "web1")
    lab.wait_ready("web1")
    assert run(lab, "web1", LOAD) == (0, "")
    found: dict[str, tuple[str, str]] = {}

    def look() -> bool:
        for line in run(lab, "web1", LOOK)[1].splitlines():
            name, serial, place = line.rsplit(maxsplit=2)
            found[serial] = (name, re.sub(r"(host|target|ata|\b)[0-9]+(?=:|/)", r"\1", place))
        return set(serials) <= set(found)

    lab.wait("the disks", look, 60)
    return found


@pytest.fixture
def images(lab: Lab) -> Iterator[None]:
    lab.sh(f"mkdir -p {HERE} && cd {HERE} && truncate -s 8M {' '.join(SERIALS)}")
    yield
    lab.undefine_all()
    lab.sh(f"rm -r {HERE}")


@pytest.mark.usefixtures("images")
def test_a_disk_on_each_bus(lab: Lab) -> None:
    lab.virtdctl("define", "-", stdin=text())
    before = start(lab, *SERIALS.values())
    names = {bus: before[serial][0] for bus, serial in SERIALS.items()}
    for bus, name in names.items():
        assert name.startswith({"virtio": "vd", "nvme": "nvme"}.get(bus, "sd")), names
    devices = {one["id"]: one for one in lab.info("web1")["hardware"]["devices"]}
    assert [devices[f"disk{number}"]["bus"] for number in range(4)] == ["pcie.0", "scsi0.0", "ide.0", "pcie.0"]
    assert devices["scsi0"]["bus"] == "pcie.0"

    def write(word: str) -> None:
        for bus, name in names.items():
            command = f"echo {word} on {bus} | dd of=/dev/{name} conv=notrunc,fsync 2>/dev/null"
            assert run(lab, "web1", command) == (0, ""), bus

    def read(word: str) -> None:
        run(lab, "web1", "echo 3 >/proc/sys/vm/drop_caches")
        for bus, name in names.items():
            said = run(lab, "web1", f"dd if=/dev/{name} bs=512 count=1 2>/dev/null | tr -d '\\0'")
            assert said == (0, f"{word} on {bus}"), bus

    write("first")
    pid = lab.info("web1")["pid"]
    lab.sh(KILL)
    lab.wait("the next daemon", lambda: lab.info("web1")["pid"] == pid, 60)
    read("first")
    write("second")
    read("second")
    assert lab.json("fsck")["differences"] == []
    lab.virtdctl("stop", "web1")
    for bus in names:
        assert lab.sh(f"head -c 512 {HERE}/{bus} | tr -d '\\0'") == f"second on {bus}\n"
        assert lab.sh(f"stat -c %U {HERE}/{bus}") == "root\n"
    after = start(lab, *SERIALS.values())
    # Linux names SCSI and SATA disks in the order in which it has found them.
    assert {serial: place for serial, (_name, place) in after.items()} == {
        serial: place for serial, (_name, place) in before.items()
    }
    assert after["SN-virtio"] == before["SN-virtio"]
    names = {bus: after[serial][0] for bus, serial in SERIALS.items()}
    read("second")


def used(lab: Lab, image: str) -> int:
    """The KiB that an image occupies on the host."""
    return int(lab.sh(f"stat -c %b {HERE}/{image}")) // 2


@pytest.mark.usefixtures("images")
def test_what_a_guest_discards(lab: Lab) -> None:
    lab.sh(f"qemu-img create -q -f qcow2 {HERE}/qcow2 8M")
    tables = f'[[disk]]\npath = "{HERE}/virtio"\nserial = "raw"\n'
    tables += f'[[disk]]\npath = "{HERE}/qcow2"\nformat = "qcow2"\nserial = "qcow2"\n'
    lab.virtdctl("define", "-", stdin=definition("web1", more=tables))
    found = start(lab, "raw", "qcow2")
    for serial, image in (("raw", "virtio"), ("qcow2", "qcow2")):
        device = f"/dev/{found[serial][0]}"
        assert run(lab, "web1", f"dd if=/dev/urandom of={device} bs=1M count=4 2>/dev/null && sync")[0] == 0
        assert used(lab, image) >= 4 << 10
        assert run(lab, "web1", f"blkdiscard {device}") == (0, "")
        assert used(lab, image) < 1 << 10, image


@pytest.mark.usefixtures("images")
def test_a_disk_that_two_guests_write(lab: Lab) -> None:
    """Both see what the other one has written; a third, which doesn't share it, isn't started."""
    image = f"{HERE}/scsi"
    lab.sh(f"chmod 600 {image}")
    wanted = {"web1": 'bus = "scsi"\nserial = "S"\nshared = true\n', "web2": "shared = true\n", "web3": ""}
    for name, options in wanted.items():
        lab.virtdctl("define", "-", stdin=definition(name, more=f'[[disk]]\npath = "{image}"\n{options}'))
    device = start(lab, "S")["S"][0]
    refused = lab.virtdctl("start", "web3", check=False)
    assert f"{image} is in use by domain web1" in refused.stderr
    lab.virtdctl("start", "web2")
    lab.wait_ready("web2")
    assert acl(lab, image) == ["user:vm-web1:rw-", "user:vm-web2:rw-"]
    assert lab.sh(f"stat -c %U {image}") == "root\n"
    lab.sh(KILL)
    assert f"{image} is in use by domain" in lab.virtdctl("start", "web3", check=False).stderr
    write = "echo from {} | dd of=/dev/{} seek={} conv=notrunc,fsync 2>/dev/null"
    read = "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/{} skip={} count=1 2>/dev/null | tr -d '\\0'"
    assert run(lab, "web1", write.format("web1", device, 1)) == (0, "")
    assert run(lab, "web2", read.format("vda", 1)) == (0, "from web1")
    lab.virtdctl("stop", "web1")
    assert acl(lab, image) == ["user:vm-web2:rw-"]
    assert run(lab, "web2", write.format("web2", "vda", 2)) == (0, "")
    device = start(lab, "S")["S"][0]
    assert run(lab, "web1", read.format(device, 2)) == (0, "from web2")
    lab.virtdctl("stop", "web1", "web2")
    assert acl(lab, image) == []
    assert lab.sh(f"stat -c '%U %a' {image}") == "root 600\n"


def ask(lab: Lab, command: str) -> str:
    """QEMU's answer to a QMP command, by the monitor that nobody uses while the guest runs."""
    return lab.sh(
        "python3 - <<'END'\n"
        "import json, socket\n"
        "monitor = socket.socket(socket.AF_UNIX)\n"
        "monitor.connect('/run/virtd/qemu/web1/shutdown.sock')\n"
        "file = monitor.makefile('rw')\n"
        f"for command in ('qmp_capabilities', '{command}'):\n"
        "    file.write(json.dumps({'execute': command})); file.flush()\n"
        "    while 'return' not in (line := file.readline()) and 'error' not in line:\n"
        "        pass\n"
        "print(line)\n"
        "END"
    )


@pytest.mark.usefixtures("images")
def test_a_cdrom_drive_on_scsi(lab: Lab) -> None:
    """One with a medium and one whose medium is missing; both are drives to the guest."""
    lab.sh(f"head -c 2M /dev/urandom >{HERE}/there.iso")
    tables = "".join(f'[[cdrom]]\npath = "{HERE}/{name}.iso"\nbus = "scsi"\n' for name in ("there", "gone"))
    lab.virtdctl("define", "-", stdin=definition("web1", more=tables))
    start(lab)
    assert lab.info("web1")["cdroms"] == [f"{HERE}/there.iso", None]
    assert [problem["text"] for problem in lab.info("web1")["problems"]] == [
        f"cdrom[1] is empty, no such file: {HERE}/gone.iso"
    ]
    # A type of 5 is a CD-ROM (SCSI Primary Commands, "Peripheral device type").
    types = "cd /sys/bus/scsi/devices; for d in [0-9]*; do echo ${d#*:} $(cat $d/type); done"
    lab.wait("both drives", lambda: run(lab, "web1", types)[1].splitlines() == ["0:0:0 5", "0:1:0 5"], 60)
    buses = {one["id"]: one["bus"] for one in lab.info("web1")["hardware"]["devices"]}
    assert (buses["cdrom0"], buses["cdrom1"]) == ("scsi0.0", "scsi0.0")


OPTIONS = {
    "one": 'cache = "none"\naio = "native"\niothread = true\n',
    "two": 'bus = "scsi"\ncache = "writethrough"\niothread = true\n',
    "three": 'bus = "scsi"\ncache = "directsync"\ndiscard = "ignore"\n',
    "four": 'bus = "sata"\ncache = "unsafe"\ndetect_zeroes = "unmap"\n',
    "five": 'bus = "nvme"\ncache = "writeback"\ndetect_zeroes = "on"\n',
}


@pytest.mark.usefixtures("images")
def test_options(lab: Lab) -> None:
    """In QEMU's sandbox they work, and the guest sees a write cache where there is one."""
    tables = ""
    for image, options in OPTIONS.items():
        lab.sh(f"truncate -s 8M {HERE}/{image}")
        tables += f'[[disk]]\npath = "{HERE}/{image}"\nserial = "{image}"\n{options}'
    lab.virtdctl("define", "-", stdin=definition("web1", more=tables))
    found = start(lab, *OPTIONS)
    caches, left = {}, {}
    for image in OPTIONS:
        name = found[image][0]
        assert run(lab, "web1", f"dd if=/dev/urandom of=/dev/{name} bs=1M count=4 2>/dev/null && sync")[0] == 0
        digest = f"dd if=/dev/{name} bs=1M count=4 2>/dev/null | sha256sum | cut -d ' ' -f 1"
        run(lab, "web1", "echo 3 >/proc/sys/vm/drop_caches")
        assert run(lab, "web1", digest) == (0, lab.sh(f"head -c 4M {HERE}/{image} | sha256sum").split()[0])
        caches[image] = run(lab, "web1", f"cat /sys/block/{name}/queue/write_cache")[1]
        free = f"dd if=/dev/zero of=/dev/{name} bs=1M count=4 2>/dev/null; sync"
        assert run(lab, "web1", free if image == "four" else f"blkdiscard /dev/{name}")[0] == 0
        left[image] = used(lab, image) >= 4 << 10
    through, back = "write through", "write back"
    assert caches == {"one": back, "two": through, "three": through, "four": back, "five": back}
    assert left == {"one": False, "two": False, "three": True, "four": False, "five": False}
    assert set(re.findall(r"iothread-\w+", ask(lab, "query-iothreads"))) == {"iothread-disk0", "iothread-scsi0"}


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("bus", ["scsi", "sata", "nvme"])
def test_boot_from(lab: Lab, bus: str) -> None:
    """The first disk has nothing to boot; the second is on another bus, and comes first."""
    lab.sh(f"qemu-img convert -O raw /usr/share/virtd-lab/disk.qcow2 {HERE}/boot.raw")
    tables = f'[[disk]]\npath = "{HERE}/virtio"\n[[disk]]\npath = "{HERE}/boot.raw"\nbus = "{bus}"\nboot = 1\n'
    lab.virtdctl("define", "-", stdin=f'name = "web1"\nmemory = "128M"\n{tables}')
    lab.virtdctl("start", "web1")
    # The firmware reads kernel and initramfs sector by sector, in an emulated CPU.
    lab.wait_ready("web1", timeout=200)


@pytest.mark.usefixtures("images")
def test_boot_from_the_network(lab: Lab) -> None:
    """The firmware itself asks for an address: there is nothing else that could."""
    lab.virtdctl("network", "define", "-", stdin='name = "lab"\n[ipv4]\naddress = "192.168.77.1/24"\n')
    mac = "52:54:00:00:77:01"
    tables = f'[[disk]]\npath = "{HERE}/virtio"\n[[nic]]\nnetwork = "lab"\nmac = "{mac}"\nboot = 1\n'
    lab.virtdctl("define", "-", stdin=f'name = "web1"\nmemory = "128M"\n{tables}')
    lab.virtdctl("start", "web1")
    lab.wait("a lease", lambda: mac in [row["mac"] for row in lab.json("network", "leases", "lab")], 120)
