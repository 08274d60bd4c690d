# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Volume on Varlink."""

from __future__ import annotations

from .interfaces import Method, change, given, look, under

METHODS: dict[str, Method] = {
    "List": look(lambda host, by, p: under("objects", host.volumes.listing(p["pool"])), shared=True),
    "Info": look(lambda host, by, p: under("object", host.volumes.info(p["pool"], p["name"])), shared=True),
    "Snapshots": look(
        lambda host, by, p: under("objects", host.volumes.snapshots(p["pool"], p["name"])), shared=True
    ),
    "Create": change(lambda host, by, p: host.volumes.create(**given(p), by=by)),
    "Clone": change(lambda host, by, p: host.volumes.clone(**given(p), by=by)),
    "Import": change(lambda host, by, p: host.volumes.import_(**given(p), by=by)),
    "Resize": change(lambda host, by, p: host.volumes.resize(**given(p), by=by)),
    "Wipe": change(lambda host, by, p: host.volumes.wipe(**given(p), by=by)),
    "Delete": change(lambda host, by, p: host.volumes.delete(p["pool"], p["name"], by=by)),
    "Upload": change(lambda host, by, p: host.volumes.upload(**given(p), by=by)),
    "Uploaded": change(lambda host, by, p: host.volumes.uploaded(p["job"], by=by)),
    "Download": change(lambda host, by, p: host.volumes.download(p["pool"], p["name"], by=by)),
    "Jobs": look(lambda host, by, p: under("objects", host.volumes.jobs())),
    "Await": look(lambda host, by, p: under("object", host.volumes.wait(p["job"], p.get("timeout"))), waiting=True),
    "Cancel": change(lambda host, by, p: host.volumes.cancel(p["job"], by=by)),
}
