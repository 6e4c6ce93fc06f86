"""The filter of system calls of a running process, as the kernel has it: which calls it may allow."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from struct import Struct

PTRACE_ATTACH, PTRACE_DETACH, PTRACE_SECCOMP_GET_FILTER = 16, 17, 0x420C
AUDIT_ARCH_X86_64 = 0xC000003E
RET_ALLOW = 0x7FFF0000
NR, ARCH = 0, 4  # in struct seccomp_data
LD_ABS, ALU_AND, RET, JA, JEQ, JGT, JGE, JSET = 0x20, 0x54, 0x06, 0x05, 0x15, 0x25, 0x35, 0x45
_INSTRUCTION = Struct("=HBBI")  # struct sock_filter
CALLS_MAX = 1024  # numbers that are tried

Instruction = tuple[int, int, int, int]


def of_process(pid: int) -> list[list[Instruction]]:
    """All filters of a process, the last one first. It is stopped meanwhile. Raises OSError without the right."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p
    libc.ptrace.restype = ctypes.c_long

    def ptrace(request: int, index: int = 0, data: object = None) -> int:
        result: int = libc.ptrace(request, pid, index, data)
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    ptrace(PTRACE_ATTACH)
    try:
        os.waitpid(pid, 0x40000000)  # __WALL
        found: list[list[Instruction]] = []
        while True:
            try:
                count = ptrace(PTRACE_SECCOMP_GET_FILTER, len(found))
            except FileNotFoundError:
                return found
            buffer = ctypes.create_string_buffer(count * _INSTRUCTION.size)
            ptrace(PTRACE_SECCOMP_GET_FILTER, len(found), buffer)
            found.append(list(_INSTRUCTION.iter_unpack(buffer.raw)))
    finally:
        ptrace(PTRACE_DETACH, data=signal.SIGCONT)


def allowed(program: Sequence[Instruction], arch: int = AUDIT_ARCH_X86_64) -> set[int]:
    """Numbers of the calls that a filter allows, with whatever arguments."""
    return {number for number in range(CALLS_MAX) if RET_ALLOW in results(program, number, arch)}


def results(program: Sequence[Instruction], number: int, arch: int) -> set[int]:
    """All that the filter may return for a call: arguments are not known, so both ways are gone."""
    found: set[int] = set()
    ways: list[tuple[int, int | None]] = [(0, None)]
    while ways:
        at, value = ways.pop()
        code, if_true, if_false, k = program[at]
        if code == RET:
            found.add(k)
        elif code == LD_ABS:
            ways.append((at + 1, {NR: number, ARCH: arch}.get(k)))
        elif code == ALU_AND:
            ways.append((at + 1, None if value is None else value & k))
        elif code == JA:
            ways.append((at + 1 + k, value))
        else:
            compare = {JEQ: int.__eq__, JGT: int.__gt__, JGE: int.__ge__, JSET: int.__and__}[code]
            for outcome, offset in ((True, if_true), (False, if_false)):
                if value is None or bool(compare(value, k)) == outcome:
                    ways.append((at + 1 + offset, value))
    return found
