# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl: finds the command, lets its module do the work, and turns an error into a message and an exit status.

The command is found by hand and only its own parser is built, which keeps the start as short as Python's own.
"""

from __future__ import annotations

import os
import sys

from virtd import __version__
from virtd.cli.exits import FAILURE, INTERRUPTED, NOT_RUNNING, OK, USAGE_ERROR, exit_status
from virtd.errors import Disconnected, VirtdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# command -> (module, group, arguments, summary, action for error messages). For each of its commands, the module's
# OPTIONS and RUN have the functions that add its options to the parser and that run it.
COMMANDS: dict[str, tuple[str, str, str, str, str]] = {
    "list": ("show", "Domains", "", "List domains with their state", "list domains"),
    "info": ("show", "Domains", "NAME", "Show everything about one domain", "show {name}"),
    "start": ("domains", "Domains", "NAME...", "Start domains", ""),
    "shutdown": ("domains", "Domains", "NAME...", "Ask guests to power off, and wait until they have", ""),
    "stop": ("domains", "Domains", "NAME...", "Stop domains at once, as if the power were cut", ""),
    "kill": ("domains", "Domains", "NAME...", "Send a signal to the domains' QEMU processes", ""),
    "reboot": ("domains", "Domains", "NAME...", "Ask guests to shut down, and restart them", ""),
    "suspend": ("domains", "Domains", "NAME...", "Pause domains, keeping them in memory", ""),
    "resume": ("domains", "Domains", "NAME...", "Resume paused domains", ""),
    "wait": ("show", "Domains", "NAME", "Wait until a domain is in a state", "wait for {name}"),
    "console": (
        "console",
        "Console and log",
        "NAME",
        "Connect to a domain's serial console",
        "open the console of {name}",
    ),
    "log": ("log", "Console and log", "NAME", "Show what a domain wrote to its console", "show the log of {name}"),
    "define": ("domains", "Definitions", "FILE|-...", "Define domains, or change their definitions", ""),
    "undefine": ("domains", "Definitions", "NAME...", "Remove the definitions of domains", ""),
    "dump": ("show", "Definitions", "NAME", "Print a domain's definition", "print the definition of {name}"),
    "upgrade-machine": ("domains", "Definitions", "NAME...", "Give domains newer hardware at their next start", ""),
    "autostart": ("domains", "Definitions", "NAME...", "Start domains when the host boots, or no longer", ""),
    "status": ("show", "The daemon", "", "Show the state of virtd, and what it recovered", "get the status of virtd"),
    "fsck": ("fsck", "The daemon", "", "Check that all that is known of each object agrees", "compare"),
    "events": ("events", "The daemon", "", "Show changes of state as they happen", "follow the events"),
    "slots": ("slots", "The daemon", "[NAME]", "Show which descriptors systemd keeps for whom", "list slots"),
    "reload": ("domains", "The daemon", "", "Make virtd read the definitions again", "reload the definitions"),
}
# Other nouns than domains: `virtdctl NOUN COMMAND ...`. noun -> (module, summary); the module has a COMMANDS of the
# same shape, whose entries also name modules, and its own OPTIONS and RUN.
NOUNS: dict[str, tuple[str, str]] = {
    "container": ("container", "Control LXC containers"),
    "network": ("network", "Control the networks that guests are connected to"),
    "pool": ("pool", "Control storage pools"),
    "volume": ("volume", "Control the volumes of storage pools"),
}
HELP_OPTIONS = """\
Options:
  -h --help                  Show this help, or with a command its own
     --version               Show the version
     --json[=short|pretty]   Print JSON, where a command reads
     --no-legend             Print neither header nor footer
     --daemon-timeout=SEC    How long to wait for a daemon that went away
     --address=PATH          The daemon's socket

See virtdctl(1) for details."""


def whole(module: str) -> str:
    """The full name of a command's module: relative ones are in this package."""
    return module if "." in module else f"virtd.cli.{module}"


def help_text(noun: str = "") -> str:
    """The output of `virtdctl [NOUN] --help`: the commands by group, like systemctl's."""
    commands = commands_of(noun)
    about = NOUNS[noun][1] if noun else "Control the virtual machines of virtd"
    usage = " ".join(filter(None, ["virtdctl", noun, "[OPTIONS...] COMMAND ..."]))
    lines = [usage, "", f"{about}.", ""]
    width = max(len(f"{name} {entry[2]}") for name, entry in commands.items()) + 2
    group = ""
    for name, (_module, its_group, arguments, summary, _doing) in commands.items():
        if its_group != group:
            lines += [""] * bool(group) + [f"{its_group}:"]
            group = its_group
        lines.append(f"  {f'{name} {arguments}':<{width}} {summary}")
    if NOUNS and not noun:
        lines += ["", "Other objects (virtdctl NOUN --help shows their commands):"]
        lines += [f"  {f'{name} COMMAND':<{width}} {summary}" for name, (_module, summary) in NOUNS.items()]
    return "\n".join([*lines, "", HELP_OPTIONS])


def commands_of(noun: str) -> dict[str, tuple[str, str, str, str, str]]:
    """The commands of a noun; "" for those of domains and of the daemon."""
    if not noun:
        return COMMANDS
    import importlib

    commands: dict[str, tuple[str, str, str, str, str]] = importlib.import_module(whole(NOUNS[noun][0])).COMMANDS
    return commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run virtdctl with the arguments `argv`; returns the exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # If our parent closed standard descriptors, reopen them in this order, so that no socket of ours gets
            # their numbers.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (as long-lived as the process)
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()  # the reader has seen enough (`virtdctl log web1 | head`), which is no failure
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as exc:
        print(f"virtdctl: {exc.strerror or exc}", file=sys.stderr)
        _drop_output()
        return FAILURE
    return status


def _drop_output() -> None:
    """Discard output that couldn't be written, and that Python would try to write again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _main(words: list[str]) -> int:
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    command, rest = _split(words)
    if command is None:
        if "--version" in rest:
            print(f"virtdctl {__version__}")
            return OK
        if "--help" in rest or "-h" in rest:
            print(help_text())
            return OK
        command = "list"
    noun = ""
    if command == "help":
        command, rest = (rest[0], [*rest[1:], "--help"]) if rest else (None, ["--help"])
        if command is None or (command not in COMMANDS and command not in NOUNS):
            print(help_text())
            return OK
    if command in NOUNS:
        noun = command
        command, rest = _split(rest)
        if command is None:
            if "--help" in rest or "-h" in rest:
                print(help_text(noun))
                return OK
            command = "list"
    if command not in commands_of(noun):
        whole = " ".join(filter(None, (noun, command)))
        tool = " ".join(filter(None, ("virtdctl", noun)))
        print(f"virtdctl: Unknown command '{whole}'.\nTry '{tool} --help' for more information.", file=sys.stderr)
        return USAGE_ERROR
    return _run(noun, command, rest)


def _split(words: list[str]) -> tuple[str | None, list[str]]:
    """The command and all other words: options may come before it as well as after."""
    from virtd.cli.options import WITH_VALUE

    # `--json` takes its value after "=" only, else it would swallow the name in `info --json web1`.
    end = words.index("--") if "--" in words else len(words)
    words = ["--json=short" if word == "--json" and at < end else word for at, word in enumerate(words)]
    at = 0
    while at < len(words) and words[at].startswith("-") and words[at] != "-":
        at += 2 if words[at] in WITH_VALUE else 1
    if at >= len(words):
        return None, words
    return words[at], words[:at] + words[at + 1 :]


def _run(noun: str, command: str, words: list[str]) -> int:
    import importlib

    from virtd.cli.client import PATIENCE, Session
    from virtd.cli.options import Parser
    from virtd.cli.output import complain

    module_name, _group, _arguments, summary, doing = commands_of(noun)[command]
    module = importlib.import_module(whole(module_name))
    parser = Parser(f"{noun} {command}".strip(), summary + ".")
    module.OPTIONS[command](parser)
    parser.common()
    try:
        args = parser.parse_args(words)
    except SystemExit as exit_:  # from --help (0) and from a usage error (2)
        return int(exit_.code or 0)
    viewer = command in ("console", "events") or getattr(args, "follow", False)
    patience = args.daemon_timeout
    if patience is ...:
        patience = None if viewer else PATIENCE
    try:
        return int(module.RUN[command](args, Session(args.address, patience, wakes=not viewer)))
    except VirtdError as error:
        complain(error, doing.format(**vars(args)))
        return (
            NOT_RUNNING
            if not noun and command in ("status", "fsck") and isinstance(error, Disconnected)
            else exit_status(error)
        )
