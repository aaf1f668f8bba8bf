"""A slow network to a server on this machine: a TCP relay that lets so many bytes a second through."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TICK = 0.05  # seconds, between two pieces


@contextmanager
def slow_network(port: int, bytes_per_second: int) -> Iterator[str]:
    """The address at which the server on `port` is reached slowly; the rate is each connection's, in each direction."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener, port, bytes_per_second), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def accept(listener: socket.socket, port: int, rate: int) -> None:
    with contextlib.suppress(OSError):  # the listener is closed
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", port))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=pass_on, args=(*ends, rate), daemon=True).start()


def pass_on(source: socket.socket, target: socket.socket, rate: int) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(max(1, int(rate * TICK))):
            time.sleep(TICK)
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
