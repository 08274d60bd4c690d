# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations in the words of virtdctl's users, for the hints of errors and problems."""

from __future__ import annotations

from .text import word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

COMMAND = "virtdctl"
# The noun of an object's commands, if it isn't its own: virtdctl's commands are about domains by default.
GROUPS = {"domain": "", "job": "volume"}
# Verbs with another name in virtdctl.
VERBS = {("job", "list"): "jobs", ("container", "resume"): "thaw"}


def operation(verb: str, noun: str, operands: Iterable[str], options: Mapping[str, str | bool]) -> str:
    """The command for an operation; see virtd.hints.do."""
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
