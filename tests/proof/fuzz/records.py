# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records: another version of virtd may have written them, or a disk that fails."""

from __future__ import annotations

import contextlib

from virtd import records

SEEDS = (
    records.encode(
        records.Record(
            driver="qemu", name="web1", uuid="a", state="running", reason="started", since="2026-11-01T00:00:00Z",
            slots={"qemu/web1/stdin": "9:12"}, data={"request": {"verb": "stop"}}, exit=records.Exit("stop", "x"),
        )
    ),
    b'{"driver":"qemu","name":"a","uuid":"","state":"","reason":"","since":"","new":[1,{"x":null}]}',
)  # fmt: skip
WORDS = (b'"exit":', b'"data":', b'"slots":', b'"schema":', b'"main_pid":', b'"unknown":')


def target(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        record = records.decode(data)
        # An older version writes back what it has read, and has to be able to read that.
        assert records.decode(records.encode(record)) == record
