# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TCP echo server that numbers what it echoes, and whose clients don't notice its restarts. See example.service."""

import os
import selectors
import socket
import sys

from virtd.fdstore import Store

# The unit's value; from systemd 254 on systemd passes it in the environment.
store = Store.from_environment(fallback_max=1000)
if "echo/listener" not in store:
    with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
        store.put("echo/listener", server.fileno())
    store.put("echo/count", os.memfd_create("count"))
listener, count = socket.socket(fileno=store.take("echo/listener")), store.get("echo/count")

selector = selectors.DefaultSelector()
selector.register(listener, selectors.EVENT_READ)
clients = [name for name in store.names() if name.startswith("echo/client/")]
for name in clients:
    selector.register(store.get(name), selectors.EVENT_READ, name)
store.notify(f"READY=1\nSTATUS=Kept {len(clients)} connections")


def echo(fd: int) -> bool:
    """Answer what has arrived; False if the client is gone."""
    try:
        if line := os.read(fd, 4096):
            number = int(os.pread(count, 20, 0) or 0) + 1
            os.pwrite(count, b"%20d" % number, 0)
            os.write(fd, b"%d %s" % (number, line))
        return bool(line)
    except ConnectionError:
        # A broken connection must not end the daemon: the next one would find it in its slot and end as well.
        return False


while True:
    for key, _ in selector.select():
        if key.fileobj is listener:
            connection, (host, port) = listener.accept()
            slot = store.put(f"echo/client/{host}-{port}", connection.fileno())
            connection.close()
            selector.register(slot.fd, selectors.EVENT_READ, slot.name)
        elif not echo(key.fd):
            selector.unregister(key.fd)
            store.drop(key.data)
