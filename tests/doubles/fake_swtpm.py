# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small process that behaves towards virtd and a QEMU as swtpm does: it serves one QEMU, and ends with it.

It takes virtd's own command line. Whatever QEMU sends is added to the file that it keeps.
"""

from __future__ import annotations

import os
import signal
import socket
import sys


def main() -> None:
    options = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    directory = options["--tpmstate"].partition("dir=")[2].partition(",")[0]
    with open(f"{directory}/tpm2-00.permall", "ab", buffering=0) as kept:
        connection, _ = socket.socket(fileno=0).accept()
        while chunk := connection.recv(4096):
            kept.write(chunk)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    main()
