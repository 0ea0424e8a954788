"""How a process of the sandbox gives up its rights: limits of the kernel, and a seccomp filter."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct

# System calls that computing needs; all others fail with EPERM. Neither a file nor a socket nor a process can be made,
# nothing can be signalled, and the timer that ends the process cannot be stopped or caught. Without futex a deadlock
# ends the process instead of waiting for the time limit.
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# fmt: off
SYSCALLS = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigreturn": 15,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "getpid": 39, "exit": 60, "gettimeofday": 96, "getrusage": 98,
        "gettid": 186, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "exit_group": 231,
        "getrandom": 318,
    },
    "aarch64": {
        "read": 63, "write": 64, "close": 57, "mmap": 222, "mprotect": 226, "munmap": 215, "brk": 214,
        "rt_sigreturn": 139, "sched_yield": 124, "mremap": 216, "madvise": 233, "getpid": 172, "exit": 93,
        "gettimeofday": 169, "getrusage": 165, "gettid": 178, "restart_syscall": 128, "clock_gettime": 113,
        "clock_getres": 114, "exit_group": 94, "getrandom": 278,
    },
}
# fmt: on
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS, _SECCOMP_FILTER = 1, 4, 22, 38, 2  # linux/prctl.h
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050001  # linux/seccomp.h


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def _filter(machine: str) -> bytes:
    """The seccomp program: classic BPF over `struct seccomp_data` (nr at 0, arch at 4)."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    calls = sorted(SYSCALLS[machine].values())
    lines = [
        (load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (give, 0, 0, _KILL),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, _EPERM),  # the x32 calls of x86_64
        *((equal, len(calls) - i, 0, number) for i, number in enumerate(calls)),
        (give, 0, 0, _EPERM), (give, 0, 0, _ALLOW),
    ]  # fmt: skip
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def lock_down(keep: set[int], seconds: float, memory_mb: int, parent: int) -> None:
    """Give up all rights but computing and the open files in `keep`.

    Args:
        seconds: of processor time; then the kernel ends the process.
        parent: the process with which this one ends.

    Raises:
        OSError: this kernel does not grant a limit. The process must then not go on.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep | {0, 1, 2}:
            with contextlib.suppress(OSError):  # the one that listed the folder
                os.close(int(name))
    os.chdir("/")
    limits = {"CORE": 0, "FSIZE": 0, "NOFILE": 0, "NPROC": 0, "CPU": int(seconds) + 2, "AS": memory_mb * 2**20}
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]  # a lower one is in force already, and cannot be raised
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (limit, limit))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # unlike RLIMIT_CPU it knows parts of a second
    _prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be watched
        os._exit(1)
    _prctl(_DUMPABLE, 0)
    _prctl(_NO_NEW_PRIVS, 1)
    code = _filter(os.uname().machine)
    program = ctypes.create_string_buffer(code, len(code))
    header = _Program(len(code) // 8, ctypes.addressof(program))
    _prctl(_SECCOMP, _SECCOMP_FILTER, ctypes.addressof(header))


def _prctl(option: int, value: int, pointer: int = 0) -> None:
    call = ctypes.CDLL(None, use_errno=True).prctl
    call.argtypes = [ctypes.c_int, *4 * [ctypes.c_ulong]]
    if call(option, value, pointer, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")
