# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's block nodes: an image and its backing files, in QEMU's own terms (BlockdevOptions in its QAPI).

Nothing is left open, because QEMU would take it from the image's header, which a guest or the image's author has
written. So the lowest node has `"backing": null`, which only this syntax can express, and no format is ever guessed.
A qcow2 image's data file can't be overridden: `qcow2.unusable` finds it beforehand.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Node = dict[str, Any]


def is_device(path: str) -> bool:
    """Whether a path is that of a block device. /dev/shm(7) has files, in memory."""
    return path.startswith("/dev/") and not path.startswith("/dev/shm/")


def file(path: str, **more: Any) -> Node:
    """The node of a file or block device itself."""
    return {"driver": "host_device" if is_device(path) else "file", "filename": path, **more}


def over(format: str, file: str | Node, backing: str | Node | None, **more: Any) -> Node:  # noqa: A002
    """The node of a format; `file` and `backing` are nodes or their names."""
    node: Node = {"driver": format, "file": file, **more}
    if format != "raw":  # which has no backing file, and doesn't accept the key
        node["backing"] = backing
    return node


def image(path: str, format: str, backing: Sequence[tuple[str, str]] = ()) -> Node:  # noqa: A002
    """One node that contains all others. `backing`: paths and formats, the nearest first."""
    below: Node | None = None
    for lower, kind in reversed(backing):
        below = over(kind, file(lower), below)
    return over(format, file(path), below)


def text(node: Node) -> str:
    """As -blockdev takes it."""
    return json.dumps(node, ensure_ascii=False)


def name(node: Node) -> str:
    """As qemu-img takes it in place of a file name."""
    return f"json:{text(node)}"
