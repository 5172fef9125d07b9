"""Runs a classic BPF program as the kernel runs a seccomp filter, to ask it about calls nobody should make."""

from __future__ import annotations

import struct

X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7  # <linux/audit.h>
KILL_PROCESS, ALLOW, ERRNO = 0x80000000, 0x7FFF0000, 0x00050000  # <linux/seccomp.h>
NUMBER, ARCH = 0, 4  # offsets in struct seccomp_data


def decide(program: bytes, number: int, arguments: tuple[int, ...] = (), arch: int = X86_64) -> tuple[int, set[int]]:
    """The filter's answer, and at which offsets of struct seccomp_data it looked."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, arch, 0, *(value & (1 << 64) - 1 for value in padded))
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    looked: set[int] = set()
    accumulator = position = 0
    while True:
        operation, yes, no, value = code[position]
        position += 1
        if operation == 0x20:  # load a word
            looked.add(value)
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x06:  # return
            return value, looked
        elif operation == 0x05:  # jump
            position += value
        elif operation == 0x15:
            position += yes if accumulator == value else no
        elif operation == 0x25:
            position += yes if accumulator > value else no
        elif operation == 0x35:
            position += yes if accumulator >= value else no
        elif operation == 0x45:
            position += yes if accumulator & value else no
        elif operation == 0x54:
            accumulator &= value
        else:
            raise ValueError(f"instruction {operation:#x} is not expected in a seccomp filter")
