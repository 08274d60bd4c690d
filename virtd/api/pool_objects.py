# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Pool and org.virtd1.PoolManager on D-Bus: pools, their volumes, and the jobs that these start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..systemd.bus import Var
from .introspection import COMMON, DEFINE, Interface, Property, methods
from .kinds import Kind
from .variants import common

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..host import Host
    from .variants import Object

POOL = "org.virtd1.Pool"
POOL_MANAGER = "org.virtd1.PoolManager"


async def listing(host: Host) -> Sequence[Object]:
    """The short forms; a host without pools needn't import their module."""
    return await host.pools.listing() if "storage" in host.drivers else []


def properties(item: Object) -> dict[str, Var]:
    """From the short form. Sizes are in bytes, 0 while they aren't known."""
    return common(item) | {
        "Type": Var("s", item.get("type") or ""),
        "Path": Var("s", item.get("path") or ""),
        "Capacity": Var("t", item.get("capacity") or 0),
        "Allocation": Var("t", item.get("allocation") or 0),
        "Available": Var("t", item.get("available") or 0),
    }


MEMBERS = Interface(
    methods=methods(
        "org.virtd1.Pool",
        Info=("Info", "", "info=object:a{sv}"),
        Dump=("Dump", "", "text:s"),
        Start=("Start", "", "changed:b"),
        Stop=("Stop", "", "changed:b"),
        Refresh=("Refresh", "", "volumes:x"),
        SetAutostart=("Autostart", "enable:b", "changed:b"),
        Undefine=("Undefine", "", ""),
    )
    | methods(
        "org.virtd1.Volume",
        ListVolumes=("List", "", "volumes=objects:aa{sv}"),
        VolumeInfo=("Info", "volume=name:s", "info=object:a{sv}"),
        ListSnapshots=("Snapshots", "volume=name:s", "snapshots=objects:aa{sv}"),
        # Each returns the job that is under way, "" when everything is done.
        CreateVolume=("Create", "volume=name:s size:s format:s", "job:s"),
        CloneVolume=("Clone", "volume=source:s to=name:s", "job:s"),
        # `from` is the format, which is never guessed, of the image, or without one of the file that has that name.
        ImportVolume=("Import", "volume=name:s file:s from=source_format:s format:s", "job:s"),
        ResizeVolume=("Resize", "volume=name:s size:s", "job:s"),
        WipeVolume=("Wipe", "volume=name:s", "job:s"),
        DeleteVolume=("Delete", "volume=name:s", "job:s"),
        # `content` is to be written from `offset` on, more than 0 only with `resume`. Size 0: not known.
        UploadVolume=("Upload", "volume=name:s format:s size:t resume:b", "job:s content:h offset:t"),
        DownloadVolume=("Download", "volume=name:s", "format:s content:h"),
    ),
    properties=COMMON
    | {
        "Type": Property("s"),
        "Path": Property("s"),
        "Capacity": Property("t"),
        "Allocation": Property("t"),
        "Available": Property("t"),
    },
)
MANAGING = Interface(
    methods=methods("org.virtd1.Pool", Define=(*DEFINE[:2], "name:s uuid:s created:b path:s warnings:as"))
    | methods(
        "org.virtd1.Volume",
        ListJobs=("Jobs", "", "jobs=objects:aa{sv}"),
        WaitJob=("Await", "job:s timeout:d", "job=object:a{sv}"),
        CancelJob=("Cancel", "job:s", "changed:b"),
        # To be called when everything has been written to UploadVolume's descriptor; returns the job that is under
        # way, "" when everything is done.
        Uploaded=("Uploaded", "job:s", "job:s"),
    ),
)
KIND = Kind(
    segment="pool",
    interface=POOL,
    members=MEMBERS,
    driver="storage",
    listing=listing,
    info=lambda host, name: host.pools.info(name),
    properties=properties,
    manager=POOL_MANAGER,
    managing=MANAGING,
)
