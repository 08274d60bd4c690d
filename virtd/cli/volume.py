# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtctl volume: the volumes of storage pools, and the jobs that make and change them."""

from __future__ import annotations

import os
import time

from virtd.cli import jobs
from virtd.cli.client import Call, constant
from virtd.cli.domains import act
from virtd.cli.exits import OK, exit_status
from virtd.cli.output import (
    GREEN,
    RED,
    YELLOW,
    ago,
    clean,
    complain,
    labelled,
    paint,
    plural,
    rounded,
    table,
    write_json,
)
from virtd.errors import NotFound, VirtdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from virtd.cli.client import Session
    from virtd.cli.options import Parser

COMMANDS: dict[str, tuple[str, str, str, str, str]] = {
    "list": ("volume", "Volumes", "POOL", "List the volumes of a pool", "list the volumes of {pool}"),
    "info": ("volume", "Volumes", "POOL NAME", "Show all about one volume", "show {name}"),
    "snapshots": ("volume", "Volumes", "POOL NAME", "List the snapshots in a volume", "list the snapshots of {name}"),
    "create": ("volume", "Volumes", "POOL NAME [SIZE]", "Make an empty volume", "create {name}"),
    "clone": ("volume", "Volumes", "POOL FROM TO", "Copy a volume", "clone {source}"),
    "import": ("volume", "Volumes", "POOL NAME [FILE]", "Make a volume of an image", "import {name}"),
    "upload": ("transfer", "Volumes", "POOL NAME FILE|-", "Make a volume of a file's content", "upload {name}"),
    "download": ("transfer", "Volumes", "POOL NAME FILE|-", "Copy a volume's content into a file", "download {name}"),
    "resize": ("volume", "Volumes", "POOL NAME SIZE", "Change a volume's size", "resize {name}"),
    "wipe": ("volume", "Volumes", "POOL NAME", "Overwrite a volume with zeros", "wipe {name}"),
    "delete": ("volume", "Volumes", "POOL NAME...", "Delete volumes", ""),
    "jobs": ("volume", "Jobs", "", "List the jobs under way, and the last that are over", "list jobs"),
    "wait": ("volume", "Jobs", "JOB", "Wait until a job is over", "{job}"),
    "cancel": ("volume", "Jobs", "JOB...", "End jobs, and remove what they have made", ""),
}
JOB_COLOURS = {"running": GREEN, "waiting": YELLOW, "failed": RED}


def list_(args: argparse.Namespace, session: Session) -> int:
    volumes = session.call("Volume.List", {"pool": args.pool})["objects"]
    if args.json:
        write_json(volumes, args.json)
        return OK
    rows = [
        (
            str(volume.get("name")),
            str(volume.get("format") or "?"),
            _size(volume.get("capacity")),
            _size(volume.get("allocation")),
            _backing(volume, args.pool),
            _use(volume),
        )
        for volume in volumes
    ]
    table(("NAME", "FORMAT", "SIZE", "USED", "BACKING", "STATE"), rows, legend=not args.no_legend)
    if not args.no_legend:
        print(("\n" if rows else "") + plural(len(rows), "volume") + " listed.")
    return OK


def _size(number: object) -> str:
    return rounded(number) if isinstance(number, int) else "-"


def _backing(volume: dict[str, Any], pool: str) -> str:
    backing = volume.get("backing")
    if not backing:
        return "-"
    return str(backing["volume"]) if backing["pool"] == pool else f"{backing['pool']}/{backing['volume']}"


def _use(volume: dict[str, Any]) -> str:
    if volume.get("trouble"):
        return f"unusable: {volume['trouble']}"
    if volume.get("job"):
        return f"busy ({volume['job']})"
    if volume.get("used_by"):
        return f"in use by {', '.join(volume['used_by'])}"
    return "ready" if volume.get("format") else "of unknown format"


def info(args: argparse.Namespace, session: Session) -> int:
    volume = session.call("Volume.Info", {"pool": args.pool, "name": args.name})["object"]
    if args.json:
        write_json(volume, args.json)
        return OK
    trouble = str(volume.get("trouble") or "")
    labelled(
        [
            ("Volume", f"{volume.get('name')} (pool {volume.get('pool')})"),
            ("Path", str(volume.get("path"))),
            ("Format", str(volume.get("format") or "not known")),
            ("Size", _size(volume.get("capacity"))),
            ("Used", _size(volume.get("allocation"))),
            ("Stands on", "\n".join(_link(link) for link in volume.get("chain") or [])),
            ("Backs", ", ".join(map(str, volume.get("backing_of") or []))),
            ("Snapshots", str(volume.get("snapshots") or "")),
            ("Used by", ", ".join(map(str, volume.get("used_by") or []))),
            ("Job", str(volume.get("job") or "")),
        ]
    )
    if trouble:
        print(paint(clean(f"{'Problem':>10}: {trouble}"), RED))
    return OK


def _link(link: dict[str, Any]) -> str:
    return f"{link['volume']} (pool {link['pool']}, {link['format']})"


def snapshots(args: argparse.Namespace, session: Session) -> int:
    found = session.call("Volume.Snapshots", {"pool": args.pool, "name": args.name})["objects"]
    if args.json:
        write_json(found, args.json)
        return OK
    rows = [
        (
            str(item.get("id")),
            str(item.get("name")),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item.get("at") or 0)),
            _size(item.get("state")),
        )
        for item in found
    ]
    table(("ID", "NAME", "TIME", "MEMORY"), rows, legend=not args.no_legend)
    if not args.no_legend:
        print(("\n" if rows else "") + plural(len(rows), "snapshot") + " listed.")
    return OK


def create(args: argparse.Namespace, session: Session) -> int:
    parameters = {
        "pool": args.pool,
        "name": args.name,
        "size": args.size,
        "format": args.format,
        "preallocation": args.preallocation,
        "backing": args.backing,
        "backing_pool": args.backing_pool,
        "token": jobs.token(),
    }
    jobs.run(session, "Volume.Create", parameters, f"Creating {args.name}")
    return OK


def clone(args: argparse.Namespace, session: Session) -> int:
    parameters = {
        "pool": args.pool,
        "source": args.source,
        "name": args.name,
        "to_pool": args.to_pool,
        "token": jobs.token(),
    }
    jobs.run(session, "Volume.Clone", parameters, f"Cloning {args.source}")
    return OK


def import_(args: argparse.Namespace, session: Session) -> int:
    parameters = {
        "pool": args.pool,
        "name": args.name,
        # The daemon's working directory isn't the caller's.
        "file": os.path.abspath(args.file) if args.file is not None else None,
        "source_format": getattr(args, "from"),
        "probe": args.probe,
        "format": args.format,
        "token": jobs.token(),
    }
    jobs.run(session, "Volume.Import", parameters, f"Importing {args.name}")
    return OK


def resize(args: argparse.Namespace, session: Session) -> int:
    parameters = {
        "pool": args.pool,
        "name": args.name,
        "size": args.size,
        "shrink": args.shrink,
        "token": jobs.token(),
    }
    jobs.run(session, "Volume.Resize", parameters, f"Resizing {args.name}")
    return OK


def wipe(args: argparse.Namespace, session: Session) -> int:
    parameters = {"pool": args.pool, "name": args.name, "token": jobs.token()}
    jobs.run(session, "Volume.Wipe", parameters, f"Wiping {args.name}")
    return OK


def delete(args: argparse.Namespace, session: Session) -> int:
    status = OK
    for name in args.names:  # one after the other: the next may be what this one stands on
        parameters = {"pool": args.pool, "name": name}
        with Call(session, "Volume.Delete", constant(parameters), limit=jobs.WORK) as call:
            try:
                call.result()
            except VirtdError as error:
                if not (call.repeated and isinstance(error, NotFound)):
                    complain(error, f"delete {name}")
                    status = status or exit_status(error)
    return status


def list_jobs(args: argparse.Namespace, session: Session) -> int:
    found = session.call("Volume.Jobs")["objects"]
    if args.json:
        write_json(found, args.json)
        return OK
    rows = [job_row(job) for job in found]
    table(("JOB", "STATE", "DONE", "WHAT", "SINCE", "ERROR"), rows, legend=not args.no_legend)
    if not args.no_legend:
        print(("\n" if rows else "") + plural(len(rows), "job") + " listed.")
    return OK


def job_row(job: dict[str, Any]) -> tuple[str, ...]:
    progress = job.get("progress")
    return (
        str(job.get("job")),
        str(job.get("state")),
        f"{progress:.0f} %" if isinstance(progress, (int, float)) else "-",
        f"{job.get('verb')} {job.get('pool')}/{job.get('volume')}",
        ago(job.get("since") or "") or "-",
        str(job.get("error") or "-"),
    )


def wait(args: argparse.Namespace, session: Session) -> int:
    jobs.wait(session, args.job, args.job)
    return OK


def cancel(args: argparse.Namespace, session: Session) -> int:
    def begin(name: str) -> Call:
        return Call(session, "Volume.Cancel", constant({"job": name}), limit=jobs.WORK)

    return act(args.names, "cancel", begin, lambda _name, call: call.result())


def pool_argument(parser: Parser) -> None:
    parser.add_argument("pool", metavar="POOL", help="a pool's name or UUID")


def volume_arguments(parser: Parser) -> None:
    pool_argument(parser)
    parser.add_argument("name", metavar="NAME", help="a volume's name")


def _list_options(parser: Parser) -> None:
    pool_argument(parser)
    parser.legend()
    parser.json()


def _info_options(parser: Parser) -> None:
    volume_arguments(parser)
    parser.json()


def _snapshots_options(parser: Parser) -> None:
    volume_arguments(parser)
    parser.legend()
    parser.json()


def format_option(parser: Parser, what: str) -> None:
    parser.add_argument("--format", choices=("raw", "qcow2"), help=what)


def _create_options(parser: Parser) -> None:
    volume_arguments(parser)
    parser.add_argument(
        "size", metavar="SIZE", nargs="?", help="such as 10G or 512MiB; with --backing it may be left out"
    )
    format_option(parser, "raw unless given, qcow2 with --backing")
    parser.add_argument(
        "--preallocation",
        choices=("off", "metadata", "falloc", "full"),
        help="how much of it is there from the beginning, off unless given",
    )
    parser.add_argument("--backing", metavar="VOLUME", help="the volume that it stands on")
    parser.add_argument("--backing-pool", metavar="POOL", help="that volume's pool, if it is another one")


def _clone_options(parser: Parser) -> None:
    pool_argument(parser)
    parser.add_argument("source", metavar="FROM", help="the volume to copy")
    parser.add_argument("name", metavar="TO", help="what the copy is called")
    parser.add_argument("--to-pool", metavar="POOL", help="where the copy goes, if that is another pool")


def _import_options(parser: Parser) -> None:
    volume_arguments(parser)
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="an image; without it, what others have put into the pool as NAME"
    )
    parser.add_argument("--from", metavar="FORMAT", help="what it is: raw, qcow2, vmdk, vdi, vhdx or vpc")
    parser.add_argument(
        "--probe", action="store_true", help="look at it to find that out; not for what a guest could write to"
    )
    format_option(parser, "what it shall be: as it is, if that is raw or qcow2, else qcow2")


def _resize_options(parser: Parser) -> None:
    volume_arguments(parser)
    parser.add_argument("size", metavar="SIZE", help="such as 20G")
    parser.add_argument("--shrink", action="store_true", help="let it lose what is beyond a smaller size")


def _delete_options(parser: Parser) -> None:
    pool_argument(parser)
    parser.add_argument("names", metavar="NAME", nargs="+", help="volumes' names")


def _jobs_options(parser: Parser) -> None:
    parser.legend()
    parser.json()


def _wait_options(parser: Parser) -> None:
    parser.add_argument("job", metavar="JOB", help="as virtctl volume jobs shows it")


def _cancel_options(parser: Parser) -> None:
    parser.add_argument("names", metavar="JOB", nargs="+", help="as virtctl volume jobs shows them")


OPTIONS: dict[str, Callable[[Parser], None]] = {
    "list": _list_options,
    "info": _info_options,
    "snapshots": _snapshots_options,
    "create": _create_options,
    "clone": _clone_options,
    "import": _import_options,
    "resize": _resize_options,
    "wipe": volume_arguments,
    "delete": _delete_options,
    "jobs": _jobs_options,
    "wait": _wait_options,
    "cancel": _cancel_options,
}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {
    "list": list_,
    "info": info,
    "snapshots": snapshots,
    "create": create,
    "clone": clone,
    "import": import_,
    "resize": resize,
    "wipe": wipe,
    "delete": delete,
    "jobs": list_jobs,
    "wait": wait,
    "cancel": cancel,
}
