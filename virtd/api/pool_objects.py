# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Pool and org.virtd1.PoolManager on D-Bus: pools, their volumes, and the jobs that these start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..bus import Descriptor, Var
from .variants import common, dictionary

if TYPE_CHECKING:
    from ..host import Caller, Host
    from .variants import Object


def properties(item: Object) -> dict[str, Var]:
    """From the short form. Sizes are in bytes, 0 while they aren't known."""
    return common(item) | {
        "Type": Var("s", item.get("type") or ""),
        "Path": Var("s", item.get("path") or ""),
        "Capacity": Var("t", item.get("capacity") or 0),
        "Allocation": Var("t", item.get("allocation") or 0),
        "Available": Var("t", item.get("available") or 0),
    }


async def call(host: Host, name: str, member: str, args: tuple[Any, ...], by: Caller | None) -> tuple[Any, ...]:
    pools, volumes = host.pools, host.volumes
    match member:
        case "Info":
            return (dictionary(await pools.info(name)),)
        case "Dump":
            return (await pools.dump(name),)
        case "ListVolumes":
            return ([dictionary(volume) for volume in await volumes.listing(name)],)
        case "VolumeInfo":
            return (dictionary(await volumes.info(name, args[0])),)
        case "ListSnapshots":
            return ([dictionary(snapshot) for snapshot in await volumes.snapshots(name, args[0])],)
    assert by is not None
    match member:
        case "Start":
            return ((await pools.start(name, by=by))["changed"],)
        case "Stop":
            return ((await pools.stop(name, by=by))["changed"],)
        case "Refresh":
            return ((await pools.refresh(name, by=by))["volumes"],)
        case "SetAutostart":
            return ((await pools.set_autostart(name, args[0], by=by))["changed"],)
        case "CreateVolume":
            volume, size, kind = args
            done = await volumes.create(name, volume, size or None, format=kind or None, by=by)
        case "CloneVolume":
            done = await volumes.clone(name, args[0], args[1], by=by)
        case "ImportVolume":
            volume, file, source, kind = args
            done = await volumes.import_(
                name, volume, file or None, source_format=source or None, format=kind or None, by=by
            )
        case "ResizeVolume":
            done = await volumes.resize(name, args[0], args[1], by=by)
        case "WipeVolume":
            done = await volumes.wipe(name, args[0], by=by)
        case "DeleteVolume":
            done = await volumes.delete(name, args[0], by=by)
        case "UploadVolume":
            volume, kind, size, resume = args
            stream = await volumes.upload(name, volume, format=kind or None, size=size or None, resume=resume, by=by)
            return stream.value["job"], Descriptor(stream.fds[0]), stream.value["offset"]
        case "DownloadVolume":
            stream = await volumes.download(name, args[0], by=by)
            return stream.value["format"] or "", Descriptor(stream.fds[0])
        case _:  # Undefine: the table has let nothing else through
            await pools.undefine(name, by=by)
            return ()
    return (done["job"],)


async def manage(host: Host, member: str, args: tuple[Any, ...], by: Caller | None) -> tuple[Any, ...]:
    match member:
        case "ListJobs":
            return ([dictionary(job) for job in await host.volumes.jobs()],)
        case "WaitJob":
            job, timeout = args
            return (dictionary(await host.volumes.wait(job, timeout if timeout > 0 else None)),)
    assert by is not None
    if member == "CancelJob":
        return ((await host.volumes.cancel(args[0], by=by))["changed"],)
    if member == "Uploaded":
        return ((await host.volumes.uploaded(args[0], by=by))["job"],)
    text, source, check = args
    done = await host.pools.define(text, source, check=check, by=by)
    return done["name"], done["uuid"], done["created"], done["path"], done["warnings"]
