# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inputs made of other inputs, the same ones for the same seed: for `make test`, and where there is no atheris."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# What breaks things that numbers, texts and structures are read from.
WORDS = (
    b"\0", b"\n", b"\r\n", b"\x1b", b"\x7f", b"\x85", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0",
    b"-1", b"0", b"1e999", b"NaN", b"9223372036854775808", b"99999999999999999999999999", b"null", b"true", b"{}",
    b"[]", b'""', b"[" * 300,
    b'{"a":' * 300, b"\\ud800", b"\xed\xa0\x80", "\u2028".encode(), "ä".encode(), "٣".encode(),
    b"..", b"/", b"%s", b"$", b"'", b'"', b"\\", b":", b" ", b"\t",
)  # fmt: skip


def inputs(
    seeds: Sequence[bytes], *, words: Sequence[bytes] = (), limit: int = 4096, seed: int = 0
) -> Iterator[bytes]:
    """Changed ones without end."""
    rng = random.Random(seed)
    pool = list(seeds) or [b""]
    vocabulary = (*WORDS, *words, *words)
    while True:
        data = bytearray(rng.choice(pool))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            _change(data, rng, pool, vocabulary)
        yield bytes(data[:limit])


def _change(data: bytearray, rng: random.Random, pool: Sequence[bytes], words: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 32)))
    match rng.randrange(8):
        case 0:
            data[at:end] = b""
        case 1:
            data[at:at] = rng.choice(words)
        case 2:
            data[at:end] = rng.choice(words)
        case 3:
            data[at:end] = rng.randbytes(end - at)
        case 4:
            if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
        case 5:
            data[at:at] = data[at:end] * rng.choice((1, 2, 16))
        case 6:
            other = rng.choice(pool)
            start = rng.randrange(len(other) + 1)
            data[at:end] = other[start : start + rng.choice((4, 16, 64, 256))]
        case _:
            del data[at:]
