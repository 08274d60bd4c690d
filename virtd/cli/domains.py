# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that change something, from define to reload.

Those that take several names act on all of them at once, report failures in the order of the command line, and end
with the exit status of the first failure. Like systemctl, they print nothing on success.
"""

from __future__ import annotations

import sys
import time

from virtd.cli.client import PATIENCE, Call, constant
from virtd.cli.exits import FAILURE, OK, exit_status
from virtd.cli.options import duration, signal_number
from virtd.cli.output import RED, YELLOW, clean, complain, paint
from virtd.errors import InvalidDefinition, InvalidState, NotFound, TimedOut, VirtdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from virtd.cli.client import Parameters, Reply, Session
    from virtd.cli.options import Parser

AT_ONCE = 64  # calls under way at the same time; each has a connection
WORK = 120.0  # seconds that the daemon may take for one command; its own limits, for systemd and QEMU, are shorter
ASKED = 1.0  # seconds without an error after which `shutdown --no-wait` counts as successful
FOREVER = 1e9  # no limit: leaving it out would mean the daemon's own


def act(names: Sequence[str], verb: str, begin: Callable[[str], Call], end: Callable[[str, Call], object]) -> int:
    """Begin a call for each of `names`, finish them in the same order, and report failures; returns the exit
    status."""
    status = OK
    for at in range(0, len(names), AT_ONCE):
        for name, call in [(name, begin(name)) for name in names[at : at + AT_ONCE]]:
            with call:
                try:
                    end(name, call)
                except VirtdError as error:
                    complain(error, f"{verb} {name}")
                    status = status or exit_status(error)
    return status


def _result(_name: str, call: Call) -> Reply:
    return call.result()


def plain(verb: str, method: str) -> Callable[[argparse.Namespace, Session], int]:
    """A command that calls one method with just a name."""

    def run(args: argparse.Namespace, session: Session) -> int:
        def begin(name: str) -> Call:
            return Call(session, method, constant({"name": name}), limit=WORK)

        return act(args.names, verb, begin, _result)

    return run


def killing(method: str = "Kill") -> Callable[[argparse.Namespace, Session], int]:
    """The command that sends a signal by `method`."""

    def run(args: argparse.Namespace, session: Session) -> int:
        def begin(name: str) -> Call:
            # Not repeated: a signal sent twice may do what the first didn't.
            return Call(session, method, constant({"name": name, "signal": args.signal}), limit=WORK, repeat=False)

        return act(args.names, "kill", begin, _result)

    return run


def shutting_down(prefix: str = "", virtdctl: str = "virtdctl") -> Callable[[argparse.Namespace, Session], int]:
    """The command that asks guests to shut down; `prefix` is the interface's, such as "Container."."""

    def run(args: argparse.Namespace, session: Session) -> int:
        now = time.monotonic()
        until = None if args.timeout is None else now + args.timeout

        def begin(name: str) -> Call:
            def parameters(_attempt: int) -> Parameters:
                # After a restart of the daemon in the middle, only the remaining time is passed.
                return {"name": name, "timeout": None if until is None else max(0.0, until - time.monotonic())}

            if args.no_wait:
                # The daemon continues whether or not anybody waits. Invalid requests are refused at once.
                return Call(session, f"{prefix}Shutdown", parameters, limit=max(0.0, now + ASKED - time.monotonic()))
            return Call(
                session, f"{prefix}Shutdown", parameters, limit=None if until is None else args.timeout + PATIENCE
            )

        def end(name: str, call: Call) -> None:
            try:
                call.result()
            except TimedOut as error:
                if args.no_wait:
                    return
                error.hint = (
                    error.hint
                    or f"{'it' if prefix else 'the guest'} runs on; {virtdctl} stop {name} stops it at once"
                )
                raise
            except InvalidState:
                # The guest may have ended while the daemon was away: then the second attempt found nothing to shut
                # down.
                if not call.repeated:
                    raise
                if session.call(f"{prefix}Info", {"name": name})["object"].get("state") not in ("stopped", "crashed"):
                    raise

        return act(args.names, "shut down", begin, end)

    return run


def reboot(args: argparse.Namespace, session: Session) -> int:
    def begin(name: str) -> Call:
        # Not repeated: a second reboot would interrupt the boot after the first.
        parameters: Parameters = {"name": name, "force": args.force, "timeout": args.timeout}
        limit = None if args.timeout is None else args.timeout + WORK
        return Call(session, "Reboot", constant(parameters), limit=limit, repeat=False)

    def end(name: str, call: Call) -> None:
        try:
            call.result()
        except TimedOut as error:
            error.hint = error.hint or f"the guest runs on; virtdctl reboot --force {name} resets it at once"
            raise

    return act(args.names, "reboot", begin, end)


def undefining(method: str = "Undefine") -> Callable[[argparse.Namespace, Session], int]:
    """The command that removes definitions by `method`."""

    def run(args: argparse.Namespace, session: Session) -> int:
        def begin(name: str) -> Call:
            return Call(session, method, constant({"name": name}), limit=WORK)

        def end(_name: str, call: Call) -> None:
            try:
                call.result()
            except NotFound:
                if not call.repeated:
                    raise

        if getattr(args, "remove_state", False):
            failed = plain("remove the state of", "RemoveState")(args, session)
            if failed:
                return failed
        return act(args.names, "undefine", begin, end)

    return run


def autostarting(method: str = "Autostart") -> Callable[[argparse.Namespace, Session], int]:
    """The command that sets what is started at boot, by `method`."""

    def run(args: argparse.Namespace, session: Session) -> int:
        def begin(name: str) -> Call:
            return Call(session, method, constant({"name": name, "enable": not args.disable}), limit=WORK)

        verb = "disable the autostart of" if args.disable else "enable the autostart of"
        return act(args.names, verb, begin, _result)

    return run


def defining(method: str = "Define") -> Callable[[argparse.Namespace, Session], int]:
    """The command that takes definitions by `method`.

    One file after the other, because a later one may refer to what an earlier one defines.
    """

    def run(args: argparse.Namespace, session: Session) -> int:
        status = OK
        for file in args.files:
            source = "<stdin>" if file == "-" else file
            try:
                text = _read(file, source)
                parameters: Parameters = {"text": text, "source": source, "check": args.check}
                with Call(session, method, constant(parameters), limit=WORK) as call:
                    reply = call.result().parameters
                _defined(reply, source, check=args.check)
                for warning in reply.get("warnings") or []:
                    print(paint(clean(f"{source}: warning: {warning}"), YELLOW, sys.stderr), file=sys.stderr)
            except VirtdError as error:
                complain(error, f"define {source}")
                status = status or exit_status(error)
        return status

    return run


def _read(file: str, source: str) -> str:
    try:
        if file == "-":
            return sys.stdin.buffer.read().decode()
        with open(file, "rb") as stream:
            return stream.read().decode()
    except OSError as exc:
        raise VirtdError(f"Can't read it: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidDefinition(source, "", f"UTF-8 text expected, but byte {exc.start} isn't") from exc


def _defined(reply: Parameters, source: str, *, check: bool) -> None:
    name = clean(str(reply.get("name")))
    if check:
        print(f"{source}: OK, {'would define' if reply.get('created') else 'would change'} {name}.")
    else:
        done = "Defined" if reply.get("created") else "Changed the definition of"
        print(f"{done} {name} ({clean(str(reply.get('path')))}).")


def reload(_args: argparse.Namespace, session: Session) -> int:
    with Call(session, "Reload", constant({}), limit=WORK) as call:
        reply = call.result().parameters
    if reply.get("changed"):
        print(f"Changed: {clean(', '.join(map(str, reply['changed'])))}.")
    for problem in reply.get("problems", []):
        text = f"{problem.get('object') or 'virtd'}: {problem.get('text')}"
        print(paint(clean(text), RED, sys.stderr), file=sys.stderr)
        if problem.get("hint"):
            print(f"Hint: {clean(str(problem['hint']))}", file=sys.stderr)
    return FAILURE if reply.get("problems") else OK


def time_limit(text: str) -> float:
    """A duration for the daemon."""
    limit = duration(text)
    return FOREVER if limit is None else limit


def names(parser: Parser) -> None:
    parser.names()


def kill_options(parser: Parser) -> None:
    parser.names()
    parser.add_argument(
        "-s", "--signal", type=signal_number, default=15, help="a signal's name or number (default: SIGTERM)"
    )


def shutdown_options(parser: Parser) -> None:
    parser.names()
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=time_limit,
        help="how long to wait for the guests to power off; one that hasn't by then runs on. Unless given, it is "
        "shutdown_timeout of virtd.toml",
    )
    parser.add_argument("--no-wait", action="store_true", help="only ask the guests, and don't wait")


def _reboot_options(parser: Parser) -> None:
    parser.names()
    parser.add_argument("--force", action="store_true", help="reset them at once, without asking the guests")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=time_limit,
        help="how long to wait for the guests to power off (default: shutdown_timeout of virtd.toml)",
    )


def autostart_options(parser: Parser) -> None:
    parser.names()
    parser.add_argument("--disable", action="store_true", help="no longer start them at boot")


def define_options(parser: Parser) -> None:
    parser.add_argument("files", metavar="FILE|-", nargs="+", help="a definition in TOML; - reads standard input")
    parser.add_argument("--check", action="store_true", help="only check the definition, and change nothing")


def _undefine_options(parser: Parser) -> None:
    parser.names()
    parser.add_argument(
        "--remove-state", action="store_true", help="first remove UEFI variables and what TPMs keep, for good"
    )


def _reload_options(_parser: Parser) -> None:
    pass


OPTIONS: dict[str, Callable[[Parser], None]] = {
    "start": names,
    "shutdown": shutdown_options,
    "stop": names,
    "kill": kill_options,
    "reboot": _reboot_options,
    "suspend": names,
    "resume": names,
    "define": define_options,
    "undefine": _undefine_options,
    "upgrade-machine": names,
    "autostart": autostart_options,
    "reload": _reload_options,
}
RUN: dict[str, Callable[[argparse.Namespace, Session], int]] = {
    "start": plain("start", "Start"),
    "shutdown": shutting_down(),
    "stop": plain("stop", "Stop"),
    "kill": killing(),
    "reboot": reboot,
    "suspend": plain("suspend", "Suspend"),
    "resume": plain("resume", "Resume"),
    "define": defining(),
    "undefine": undefining(),
    "upgrade-machine": plain("upgrade the machine of", "UpgradeMachine"),
    "autostart": autostarting(),
    "reload": reload,
}
