# SPDX-License-Identifier: LGPL-2.1-or-later
"""ExecStop= of a guest's unit: press the power button until the guest ends, and pull the plug when time is up.

systemd runs it when the host goes down, as the guest's user and inside its sandbox, whether or not virtd runs. It
imports next to nothing, because many of these start at once on a busy host.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time

COMMANDS = {
    "capabilities": b'{"execute": "qmp_capabilities"}\n',
    "resume": b'{"execute": "cont"}\n',  # a paused guest couldn't react to the button
    "button": b'{"execute": "system_powerdown"}\n',
    "plug": b'{"execute": "quit"}\n',
}
# A guest that is still booting, or dozes, misses the first press.
PRESS_AGAIN = 5.0


def ended(monitor: socket.socket, seconds: float) -> bool:
    """Read from QEMU until it closes the connection by ending; False if that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        monitor.settimeout(left)
        try:
            if not monitor.recv(65536):
                return True
        except TimeoutError:
            return False
        except ConnectionError:
            return True
    return False


def is_qemu(monitor: socket.socket) -> bool:
    """Whether the listener is the unit's main process, so that no other guest is shut down.

    PID 0 is a process that can't be seen from here, because it is in the guest's own PID namespace.
    """
    main = os.environ.get("MAINPID", "")
    pid = struct.unpack("3i", monitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0]
    return not main or pid in (0, int(main))


def main(argv: list[str] | None = None) -> int:
    """`virtd-guest-stop SOCKET SECONDS`; 0 if the guest has ended, 1 if that is left to systemd's SIGTERM."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2:
        print("usage: virtd-guest-stop SOCKET SECONDS", file=sys.stderr)
        return 2
    path, seconds = arguments[0], float(arguments[1])
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(5)
        try:
            monitor.connect(path)
            if not is_qemu(monitor):
                print(f"virtd-guest-stop: {path}: another process than the guest's listens there", file=sys.stderr)
                return 1
            deadline = time.monotonic() + seconds
            monitor.sendall(COMMANDS["capabilities"] + COMMANDS["resume"])
            while (left := deadline - time.monotonic()) > 0:
                monitor.sendall(COMMANDS["button"])
                if ended(monitor, min(left, PRESS_AGAIN)):
                    return 0
            monitor.sendall(COMMANDS["plug"])
            return 0 if ended(monitor, 5) else 1
        except (BrokenPipeError, ConnectionResetError):
            return 0
        except OSError as exc:
            print(f"virtd-guest-stop: {path}: {exc}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
