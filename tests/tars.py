"""Archives by hand, block by block, so that tests can say what no honest tar program writes."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping

BLOCK = 512
END = bytes(2 * BLOCK)
POSIX, GNU, V7 = b"ustar\x0000", b"ustar  \0", bytes(8)

Tree = dict[str, tuple[str, object]]


def header(
    name: bytes,
    size: int = 0,
    kind: bytes = b"0",
    *,
    mode: bytes = b"0000644\0",
    link: bytes = b"",
    magic: bytes = POSIX,
    prefix: bytes = b"",
    size_field: bytes | None = None,
    checksum: bytes | None = None,
) -> bytes:
    """One header block with a right checksum, unless another is given."""
    size_field = b"%011o\0" % size if size_field is None else size_field
    block = bytearray(
        name.ljust(100, b"\0")
        + mode.ljust(8, b"\0")
        + b"0000000\0" * 2
        + size_field.ljust(12, b"\0")
        + b"00000000000\0"
        + b" " * 8
        + kind
        + link.ljust(100, b"\0")
        + magic
        + bytes(64)
        + b"0000000\0" * 2
        + prefix.ljust(155, b"\0")
        + bytes(12)
    )
    assert len(block) == BLOCK
    block[148:156] = b"%06o\0 " % sum(block) if checksum is None else checksum
    return bytes(block)


def repaired(block: bytes) -> bytes:
    """The same header with the checksum that it should have."""
    fixed = bytearray(block)
    fixed[148:156] = b" " * 8
    fixed[148:156] = b"%06o\0 " % sum(fixed)
    return bytes(fixed)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def file(name: bytes, content: bytes = b"", **fields: object) -> bytes:
    return header(name, len(content), **fields) + padded(content)  # type: ignore[arg-type]


def directory(name: bytes) -> bytes:
    return header(name, kind=b"5", mode=b"0000755\0")


def link(name: bytes, target: bytes) -> bytes:
    return header(name, kind=b"2", link=target)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    """GNU's header for the next member's name (L) or target (K)."""
    return header(b"././@LongLink", len(name) + 1, kind, magic=GNU) + padded(name + b"\0")


def record(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3
    length = size + len(str(size))
    length = size + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def pax(payload: bytes, kind: bytes = b"x") -> bytes:
    return header(b"PaxHeaders/x", len(payload), kind) + padded(payload)


def packed(*members: bytes, end: bytes = END) -> bytes:
    """A gzip'd tar of these members."""
    return gzip.compress(b"".join(members) + end, 1, mtime=0)


@contextlib.contextmanager
def memory_file(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("archive", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as f:
            f.write(content)
        yield fd
    finally:
        os.close(fd)


def by_tarfile(tree: Mapping[str, tuple[str, object]], format: int, mode: str = "w:gz") -> bytes:
    """Python's own writer. `tree`: path -> (kind, value): content, a link's target, or None for a "directory"."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format, errors="surrogateescape") as archive:  # type: ignore[call-overload]
        for path, (kind, value) in tree.items():
            member = tarfile.TarInfo(path)
            if kind == "directory":
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif kind == "symlink":
                member.type, member.linkname = tarfile.SYMTYPE, str(value)
            else:
                member.size, member.mode = len(value), 0o755 if kind == "program" else 0o644  # type: ignore[arg-type]
            archive.addfile(member, io.BytesIO(value) if isinstance(value, bytes) else None)
    return buffer.getvalue()


def tree_of(root: str | os.PathLike[str]) -> Tree:
    """What is below `root`, in the form that `by_tarfile` takes. Follows nothing."""
    found: Tree = {}
    for here, directories, files in os.walk(root):
        for name in directories + files:
            full = os.path.join(here, name)
            status = os.lstat(full)
            path = os.path.relpath(full, root)
            if stat.S_ISLNK(status.st_mode):
                found[path] = ("symlink", os.readlink(full))
            elif stat.S_ISDIR(status.st_mode):
                found[path] = ("directory", None)
            elif stat.S_ISREG(status.st_mode):
                with open(full, "rb") as f:
                    found[path] = ("program" if status.st_mode & 0o111 else "file", f.read())
            else:
                found[path] = ("special", stat.S_IFMT(status.st_mode))
    return found
