"""How payload bytes reach a worker: a file on the same host (shared memory), or base64 within the request."""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# Payload files are read from this folder only; engines on other hosts share one with the trainer under this variable.
FOLDER_VARIABLE = "FURA_SYNC_FOLDER"
PREFIX, SUFFIX = "fura-sync-", ".safetensors"
LOCKED_SECONDS = 60.0  # after which a payload file is surely locked by the trainer that made it, if that one lives
# Shared memory counts as a container's memory, so that ENOMEM is a folder without room as well.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # of file systems without fallocate


class PayloadFolderError(RuntimeError):
    """The folder through which weights reach a server has no room for them."""


def payload_folder() -> Path:
    """Where payload files lie: shared memory where the system has it."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given or ("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())).resolve()


@contextmanager
def offered(data: bytes, transport: str) -> Iterator[dict[str, str]]:
    """`data` as a worker can fetch it, "file" or "inline"; a file is gone afterwards.

    Raises:
        PayloadFolderError: where `payload_folder()` has no room for it.
    """
    if transport == "inline":
        yield {"inline": base64.b64encode(data).decode()}
        return
    sweep()
    try:
        file = locked_file(data)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        folder, free = payload_folder(), shutil.disk_usage(payload_folder()).free
        raise PayloadFolderError(
            f"{len(data) / 1e6:.0f} MB of weights do not fit into {folder}, which has {free / 1e6:.0f} MB free "
            f"({error.strerror}): make it larger (docker run --shm-size), set {FOLDER_VARIABLE} on both sides "
            "to a folder with room, or sync_transport=inline"
        ) from error
    with file:
        yield {"file": file.name}


def locked_file(data: bytes) -> IO[bytes]:
    """A temporary file that holds `data`, gone when it is closed.

    Raises:
        OSError: with its path.
    """
    with contextlib.ExitStack() as opened:
        # unbuffered: what does not fit would be written, and raised, once more when the file is closed
        file = opened.enter_context(
            tempfile.NamedTemporaryFile(dir=payload_folder(), prefix=PREFIX, suffix=SUFFIX, buffering=0)
        )
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            reserve(file.fileno(), len(data))
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            error.filename = file.name
            raise
        opened.pop_all()
        return file


def reserve(descriptor: int, size: int) -> None:
    """Have the file system find room for `size` bytes before they are written, where it can."""
    try:
        os.posix_fallocate(descriptor, 0, max(1, size))
    except OSError as error:
        if error.errno not in CANNOT_RESERVE:
            raise


def sweep() -> None:
    """Remove what trainers that were killed have left in shared memory, which nothing else would ever give back.

    Who lives holds a lock on its file; process numbers would not tell, where containers or hosts share the folder.
    """
    for path in payload_folder().glob(f"{PREFIX}*{SUFFIX}"):
        with contextlib.suppress(OSError):  # another user's, locked, or just removed
            if time.time() - path.stat().st_mtime > LOCKED_SECONDS:
                with path.open("rb+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def read_payload(source: dict[str, str]) -> bytes:
    """The bytes of what `offered` gave.

    Raises:
        ValueError: for a path outside of `payload_folder()`, or a source of neither kind.
    """
    if "inline" in source:
        return base64.b64decode(source["inline"])
    if "file" not in source:
        raise ValueError("an update carries a source, {'inline': base64} or {'file': path}, unless it commits")
    path = Path(source["file"]).resolve()
    if payload_folder() not in path.parents:
        raise ValueError(f"payload files are read from {payload_folder()} only, not {path}; set {FOLDER_VARIABLE}")
    if not path.is_file():
        raise ValueError(
            f"{path} is not here: the trainer runs on another host or in another container; set "
            f"sync_transport=inline, or {FOLDER_VARIABLE} to a folder that both see"
        )
    return path.read_bytes()
