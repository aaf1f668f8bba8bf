"""Messages between the caller and its workers: JSON with its length before it, over a Unix socket.

JSON and not pickle: a worker handles text that a model wrote, and what it answers must be data only.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

HEADER = struct.Struct("!I")
COMMAND = struct.Struct("!cQ")  # to the nursery: a letter and the number of a worker
MAX_BYTES = 64 * 2**20


def send(connection: socket.socket, message: Any) -> None:
    body = json.dumps(message).encode()  # ASCII: lone surrogates travel as escapes
    connection.sendall(HEADER.pack(len(body)) + body)


def receive(connection: socket.socket) -> Any:
    """The next message.

    Raises:
        EOFError: where the other side has gone.
        TimeoutError: where the socket's timeout passes first.
    """
    (size,) = HEADER.unpack(receive_bytes(connection, HEADER.size))
    if size > MAX_BYTES:
        raise EOFError(f"a message of {size} bytes is none of ours")
    return json.loads(receive_bytes(connection, size))


def receive_bytes(connection: socket.socket, size: int) -> bytes:
    chunks = []
    while size:
        try:
            chunk = connection.recv(min(size, 2**20))
        except (ConnectionError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise EOFError from error
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
