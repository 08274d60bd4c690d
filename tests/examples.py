# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples in the documentation: what somebody who follows it types, and what they are shown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

_TYPED_ON = re.compile(r"<<'?([^\s']+)'?$")


class Step(NamedTuple):
    """A command, with the lines of its here-document, and what the page shows below it."""

    command: str
    shown: str


def blocks(text: str) -> Iterator[str]:
    """Code, but for fenced blocks that say that they aren't a shell's."""
    yield from re.findall(r"^```(?:sh|console|bash)\n(.*?)^```", text, re.M | re.S)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for block in re.findall(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+", text):
        yield textwrap.dedent(block)


def steps(block: str) -> list[Step]:
    """What stands after a prompt; where there is none, each line is a command that shows nothing."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    if not any(line.startswith("# ") for line in lines):
        return [Step(line, "") for line in lines]
    found: list[Step] = []
    until = ""
    for line in lines:
        if until:
            found[-1] = found[-1]._replace(command=f"{found[-1].command}\n{line}")
            until = until if line != until else ""
        elif line.startswith("# "):
            found.append(Step(line[2:], ""))
            opened = _TYPED_ON.search(line)
            until = opened[1] if opened else ""
        elif found:
            found[-1] = found[-1]._replace(shown=f"{found[-1].shown}{line}\n")
    return found


def calls(text: str) -> list[str]:
    """Each call of virtdctl in what is typed: its arguments, as text."""
    return [
        re.sub(r"\s\d*(?:<<|[<>]+&?)\s*\S+", "", called[1])
        for block in blocks(text)
        for step in steps(block)
        for part in re.split(r"\s*(?:\|\|?|&&|;)\s+", step.command.partition("\n")[0])
        if (called := re.match(r"(?:.*(?: -- |\$\(|\bdo )|sudo (?:-\S+ )*)?virtdctl(?: +|$)([^)]*)", part))
    ]


def mentions(text: str) -> list[str]:
    """The calls of virtdctl in sentences: `virtdctl info` in Markdown, **virtdctl info** in a man page."""
    return [
        " ".join(either.split()[1:])
        for pair in re.findall(r"`(virtdctl\s[^`]+)`|\*\*(virtdctl\s[^*]+)\*\*", text)
        for either in filter(None, pair)
    ]
