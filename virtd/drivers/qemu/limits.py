# SPDX-License-Identifier: LGPL-2.1-or-later
"""The limits on memory and tasks of a guest's unit, well above what any healthy guest needs.

They are to stop a QEMU that its guest has taken over, not to keep guests small. What QEMU needs besides the guest's
memory can't be predicted to the megabyte, so they are generous; page cache beyond the limit is reclaimed by the
kernel and kills nobody (Documentation/admin-guide/cgroup-v2.rst, memory.max).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...model.drives import Bus

if TYPE_CHECKING:
    from ...model.domain import Domain

MIB = 1 << 20
# Translated code: QEMU's own limit, which is an eighth of the host's memory where that is less (tcg/region.c).
TRANSLATED = 1024 * MIB
# A qcow2 image has a cache of its tables of 32 MiB at most (docs/qcow2-cache.txt), and requests under way have
# buffers.
DISK = 64 * MIB
# A mostly unused stack, KVM's page for the vCPU, and what its queue at a network card's backend may hold.
VCPU = 8 * MIB
IOTHREAD = 1 + 64  # itself, and its own thread pool
DISPLAY = 64 * MIB  # the VGA's memory, and the buffers for a VNC client


def memory_max(domain: Domain, *, kvm: bool, overhead: int | None) -> int | None:
    """Bytes for MemoryMax=. `overhead` is what virtd.toml allows in addition; None: there is no limit."""
    if overhead is None:
        return None
    # The kernel's tables for the guest's pages, QEMU's own and KVM's: 8 bytes for each 4 KiB, each.
    tables = domain.memory_bytes // 128
    disks = DISK * (len(domain.disk) + len(domain.cdrom))
    display = DISPLAY if domain.vnc is not None and domain.vnc.enabled else 0
    translated = 0 if kvm else TRANSLATED
    return domain.memory_bytes + tables + disks + VCPU * domain.vcpus + display + translated + overhead


def tasks_max(domain: Domain, *, overhead: int) -> int | None:
    """TasksMax=: a thread for each vCPU, those of disks, and `overhead` for the rest; 0: there is no limit.

    The rest is the main loop, RCU, the monitor, VNC, those of a migration, up to 64 that do what would block
    the main loop (its thread pool), and the two processes of ExecStop=.
    """
    own = sum(disk.iothread for disk in domain.disk if disk.bus is Bus.VIRTIO)
    shared = any(disk.iothread for disk in domain.disk if disk.bus is Bus.SCSI)
    return domain.vcpus + IOTHREAD * (own + shared) + overhead if overhead else None
