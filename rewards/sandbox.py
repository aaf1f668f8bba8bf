"""What a worker may not do: take over its share of memory, dump core, write a file, open a socket, run a program.

Limits are POSIX; the system call filter and the death signal are Linux's, and need no privileges.  Nothing here
protects against a hostile extension module; the verifier runs no model text as code, and this is the second wall.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
LOAD_WORD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF, linux/filter.h
ALLOW, DENY = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
OFFSET_OF_NUMBER, OFFSET_OF_ARCHITECTURE = 0, 4  # in struct seccomp_data
X32_BIT = 0x40000000  # a second set of numbers for the same calls on x86-64

# machine -> (AUDIT_ARCH value, numbers of socket, connect, bind, execve, execveat, ptrace, io_uring_setup)
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, (41, 42, 49, 59, 322, 101, 425)),
    "aarch64": (0xC00000B7, (198, 203, 200, 221, 281, 117, 425)),
}


def confine(memory_bytes: int) -> str:
    """Confine this process for good.  Returns "" or what could not be had on this system."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return block_system_calls()


def die_with_parent(parent: int) -> None:
    """End this process when `parent`, which forked it, ends; at once where it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def block_system_calls() -> str:
    """No sockets and no programs from here on.  Returns "" or why that could not be had."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in SYSTEM_CALLS:
        return f"no system call filter for {sys.platform} on {machine}"
    program = filter_program(*SYSTEM_CALLS[machine])
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0):
        return f"the system call filter was refused: {os.strerror(ctypes.get_errno())}"
    return ""


def filter_program(architecture: int, denied: tuple[int, ...]) -> bytes:
    """Deny the listed calls and every call of another architecture; allow the rest."""
    count = len(denied)
    lines = [
        (LOAD_WORD, 0, 0, OFFSET_OF_ARCHITECTURE),
        (JUMP_IF_EQUAL, 0, count + 3, architecture),
        (LOAD_WORD, 0, 0, OFFSET_OF_NUMBER),
        (JUMP_IF_AT_LEAST, count + 1, 0, X32_BIT),
        *((JUMP_IF_EQUAL, count - index, 0, number) for index, number in enumerate(denied)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, DENY),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in lines)
