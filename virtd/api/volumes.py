# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Volume on Varlink."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .interfaces import Method, given, under

if TYPE_CHECKING:
    from .interfaces import Answer


def _shared(answer: Answer) -> Method:
    """It may mean to look at much."""
    return Method(answer, shared=True)


METHODS: dict[str, Method] = {
    "List": _shared(lambda host, by, p: under("objects", host.volumes.listing(p["pool"]))),
    "Info": _shared(lambda host, by, p: under("object", host.volumes.info(p["pool"], p["name"]))),
    "Snapshots": _shared(lambda host, by, p: under("objects", host.volumes.snapshots(p["pool"], p["name"]))),
    "Create": Method(lambda host, by, p: host.volumes.create(**given(p), by=by)),
    "Clone": Method(lambda host, by, p: host.volumes.clone(**given(p), by=by)),
    "Import": Method(lambda host, by, p: host.volumes.import_(**given(p), by=by)),
    "Resize": Method(lambda host, by, p: host.volumes.resize(**given(p), by=by)),
    "Wipe": Method(lambda host, by, p: host.volumes.wipe(**given(p), by=by)),
    "Delete": Method(lambda host, by, p: host.volumes.delete(p["pool"], p["name"], by=by)),
    "Upload": Method(lambda host, by, p: host.volumes.upload(**given(p), by=by)),
    "Uploaded": Method(lambda host, by, p: host.volumes.uploaded(p["job"], by=by)),
    "Download": Method(lambda host, by, p: host.volumes.download(p["pool"], p["name"], by=by)),
    "Jobs": Method(lambda host, by, p: under("objects", host.volumes.jobs())),
    "Await": Method(lambda host, by, p: under("object", host.volumes.wait(p["job"], p.get("timeout"))), waiting=True),
    "Cancel": Method(lambda host, by, p: host.volumes.cancel(p["job"], by=by)),
}
