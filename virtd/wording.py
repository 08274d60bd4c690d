# SPDX-License-Identifier: LGPL-2.1-or-later
"""How virtdctl's users ask for an operation: how hints of errors and problems read."""

from __future__ import annotations

from .text import word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

COMMAND = "virtdctl"
# Whose commands an object's are among, where that isn't its noun: virtdctl speaks of domains unless told otherwise.
GROUPS = {"domain": "", "job": "volume"}
# Verbs that are called something else there.
VERBS = {("job", "list"): "jobs", ("container", "resume"): "thaw"}


def operation(verb: str, noun: str, operands: Iterable[str], options: Mapping[str, str | bool]) -> str:
    """The command; see virtd.hints.do."""
    words = [COMMAND, GROUPS.get(noun, noun), VERBS.get((noun, verb), verb)]
    words += [option(name) for name, value in options.items() if value is True]
    words += map(word, operands)
    for name, value in options.items():
        if isinstance(value, str):
            words += [option(name), word(value)]
    return " ".join(filter(None, words))


def option(name: str) -> str:
    """An option of a command: "--read-only" for read_only."""
    return "--" + name.rstrip("_").replace("_", "-")
