# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl volume: the volumes of storage pools, and the jobs that make and change them."""

from __future__ import annotations

import os
import time

from virtd.cli import jobs
from virtd.cli.client import Call, constant
from virtd.cli.domains import act
from virtd.cli.exits import OK, exit_status
from virtd.cli.output import RED, ago, clean, complain, labelled, listing, paint, size_of, write_json
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
    "info": ("volume", "Volumes", "POOL NAME", "Show everything about one volume", "show {name}"),
    "snapshots": ("volume", "Volumes", "POOL NAME", "List the snapshots in a volume", "list the snapshots of {name}"),
    "create": ("volume", "Volumes", "POOL NAME [SIZE]", "Make an empty volume", "create {name}"),
    "clone": ("volume", "Volumes", "POOL FROM TO", "Copy a volume", "clone {source}"),
    "import": ("volume", "Volumes", "POOL NAME [FILE]", "Make a volume from an image", "import {name}"),
    "upload": ("transfer", "Volumes", "POOL NAME FILE|-", "Make a volume from a file", "upload {name}"),
    "download": ("transfer", "Volumes", "POOL NAME FILE|-", "Copy a volume's content into a file", "download {name}"),
    "resize": ("volume", "Volumes", "POOL NAME SIZE", "Change a volume's size", "resize {name}"),
    "wipe": ("volume", "Volumes", "POOL NAME", "Overwrite a volume with zeros", "wipe {name}"),
    "delete": ("volume", "Volumes", "POOL NAME...", "Delete volumes", ""),
    "jobs": ("volume", "Jobs", "", "List running jobs, and the latest that ended", "list jobs"),
    "wait": ("volume", "Jobs", "JOB", "Wait until a job is finished", "{job}"),
    "cancel": ("volume", "Jobs", "JOB...", "End jobs, and remove what they made", ""),
}


def list_(args: argparse.Namespace, session: Session) -> int:
    volumes = session.call("Volume.List", {"pool": args.pool})["objects"]

    def row(volume: dict[str, Any]) -> tuple[str, ...]:
        return (
            str(volume.get("name")),
            str(volume.get("format") or "?"),
            size_of(volume.get("capacity")),
            size_of(volume.get("allocation")),
            _backing(volume, args.pool),
            _use(volume),
        )

    return listing(args, volumes, "volume", ("NAME", "FORMAT", "SIZE", "USED", "BACKING", "STATE"), row)


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
            ("Size", size_of(volume.get("capacity"))),
            ("Used", size_of(volume.get("allocation"))),
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
    return listing(args, found, "snapshot", ("ID", "NAME", "TIME", "MEMORY"), _snapshot)


def _snapshot(item: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(item.get("id")),
        str(item.get("name")),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item.get("at") or 0)),
        size_of(item.get("state")),
    )


def _work(method: str, what: str, *keys: str) -> Callable[[argparse.Namespace, Session], int]:
    """A command that makes a call with these of its arguments and waits for the job; `what` is shown meanwhile."""

    def run(args: argparse.Namespace, session: Session) -> int:
        given = {key: getattr(args, key) for key in ("pool", "name", *keys)}
        jobs.run(session, f"Volume.{method}", given | {"token": jobs.token()}, what.format_map(given))
        return OK

    return run


def delete(args: argparse.Namespace, session: Session) -> int:
    status = OK
    for name in args.names:  # one after the other: the next may be this one's backing file
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
    return listing(args, found, "job", ("JOB", "STATE", "DONE", "WHAT", "SINCE", "ERROR"), _job)


def _job(job: dict[str, Any]) -> tuple[str, ...]:
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
    format_option(parser, "its format (default: raw, or qcow2 if it has a backing volume)")
    parser.add_argument(
        "--preallocation",
        choices=("off", "metadata", "falloc", "full"),
        help="how much of it is allocated from the beginning (default: off)",
    )
    parser.add_argument("--backing", metavar="VOLUME", help="the volume that it is based on")
    parser.add_argument("--backing-pool", metavar="POOL", help="that volume's pool, if it is another one")


def _clone_options(parser: Parser) -> None:
    pool_argument(parser)
    parser.add_argument("source", metavar="FROM", help="the volume to copy")
    parser.add_argument("name", metavar="TO", help="the copy's name")
    parser.add_argument("--to-pool", metavar="POOL", help="where the copy goes, if that is another pool")


def _import_options(parser: Parser) -> None:
    volume_arguments(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        type=os.path.abspath,  # the daemon has another working directory
        help="an image; without it, what others have put into the pool as NAME",
    )
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="what it is: raw, qcow2, vmdk, vdi, vhdx or vpc"
    )
    parser.add_argument(
        "--probe", action="store_true", help="detect the format; not for an image that a guest could write to"
    )
    format_option(parser, "the volume's format (default: that of the image if it is raw or qcow2, else qcow2)")


def _resize_options(parser: Parser) -> None:
    volume_arguments(parser)
    parser.add_argument("size", metavar="SIZE", help="such as 20G")
    parser.add_argument(
        "--shrink", action="store_true", help="allow a smaller size, which discards what is beyond it"
    )


def _delete_options(parser: Parser) -> None:
    pool_argument(parser)
    parser.add_argument("names", metavar="NAME", nargs="+", help="volumes' names")


def _jobs_options(parser: Parser) -> None:
    parser.legend()
    parser.json()


def _wait_options(parser: Parser) -> None:
    parser.add_argument("job", metavar="JOB", help="as virtdctl volume jobs shows it")


def _cancel_options(parser: Parser) -> None:
    parser.add_argument("names", metavar="JOB", nargs="+", help="as virtdctl volume jobs shows them")


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
    "create": _work("Create", "Creating {name}", "size", "format", "preallocation", "backing", "backing_pool"),
    "clone": _work("Clone", "Cloning {source}", "source", "to_pool"),
    "import": _work("Import", "Importing {name}", "file", "source_format", "probe", "format"),
    "resize": _work("Resize", "Resizing {name}", "size", "shrink"),
    "wipe": _work("Wipe", "Wiping {name}"),
    "delete": delete,
    "jobs": list_jobs,
    "wait": wait,
    "cancel": cancel,
}
