# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small process that behaves towards virtd as dnsmasq does: says when it is up, obeys SIGHUP and SIGTERM.

The option "fail" in its file is one that it doesn't know.
"""

from __future__ import annotations

import signal
import sys


def say(text: str) -> None:
    print(f"dnsmasq: {text}", file=sys.stderr, flush=True)


def main() -> None:
    (path,) = [word.partition("=")[2] for word in sys.argv if word.startswith("--conf-file=")]
    with open(path) as file:
        options = file.read().splitlines()
    if "fail" in options:
        say(f"bad option at line {options.index('fail') + 1} of {path}")
        sys.exit(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP, signal.SIGTERM])
    say("started, version 2.91 cachesize 150")
    while signal.sigwait([signal.SIGHUP, signal.SIGTERM]) == signal.SIGHUP:
        say("read the lists again")
    say("exiting on receipt of SIGTERM")


main()
