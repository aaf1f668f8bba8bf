"""How payload bytes reach a worker: a file on the same host (shared memory), or base64 within the request."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Payload files are read from this folder only; engines on other hosts share one with the trainer under this variable.
FOLDER_VARIABLE = "FURA_SYNC_FOLDER"


def payload_folder() -> Path:
    """Where payload files lie: shared memory where the system has it."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given or ("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())).resolve()


@contextmanager
def offered(data: bytes, transport: str) -> Iterator[dict[str, str]]:
    """`data` as a worker can fetch it, "file" or "inline"; a file is gone afterwards."""
    if transport == "inline":
        yield {"inline": base64.b64encode(data).decode()}
        return
    with tempfile.NamedTemporaryFile(dir=payload_folder(), prefix="fura-sync-", suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        yield {"file": file.name}


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
