"""Archives at admission: what an upload holds, told without unpacking it, and the archive that a `/run` becomes.

Reading is `sandbox.tar`'s, the same reader that later unpacks inside the sandbox: requirement 27.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct

from sandrun.errors import InvalidInput, TooLarge
from sandrun.jobs.canonical import canonical
from sandrun.model import ARCHIVE_BYTES, ARCHIVE_MEMBERS, MANIFEST_BYTES, Manifest, check_path, show
from sandrun.sandbox.tar import FILE, IMPLIED_DIRECTORIES, SYMLINK, Archive

MANIFEST_NAME = "job.json"
"""The member that is the manifest, if none came beside the archive."""

_BLOCK = 512
_HEADER = Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_EXECUTABLE = (b"#!", b"\x7fELF")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveSummary:
    """What an archive holds.

    Attributes:
        manifest_bytes: `job.json` at the top, None if there is none; cut off a byte after the most a manifest may have.
        files: path (undecodable bytes as \\xNN), size and SHA-256 (hex) of each regular file, in the archive's order.
        others: path -> kind of each directory and symbolic link.
        unpacked_bytes: of all files' content.
        digest: SHA-256 (hex) of what is unpacked: the canonical JSON of [path, kind, SHA-256 of the content or the
            link's target, executable] for each member, by path. How it was packed leaves no trace in it.
    """

    manifest_bytes: bytes | None
    files: tuple[tuple[str, int, str], ...]
    others: Mapping[str, str] = field(default_factory=dict)
    unpacked_bytes: int
    digest: str


def check_archive(fd: int) -> ArchiveSummary:
    """Read all of a gzip'd tar, hash its files, keep nothing but the manifest. For a thread: it takes up to a second.

    Raises: InvalidInput naming the member at fault; TooLarge.
    """
    if os.fstat(fd).st_size > ARCHIVE_BYTES:
        raise TooLarge("files", ARCHIVE_BYTES)
    archive = Archive(fd)
    if not archive.gzipped:
        raise InvalidInput("files", "is not a gzip'd tar archive; pack with: tar czf job.tar.gz -C DIRECTORY .")
    manifest_bytes = None
    files: list[tuple[str, int, str]] = []
    others: dict[str, str] = {}
    listing: list[tuple[str, str, str, bool]] = []
    unpacked_bytes = 0
    for member in archive:
        path = member.path.decode(errors="backslashreplace")
        if member.kind == FILE:
            digest = hashlib.sha256()
            kept = bytearray()
            for piece in archive.content():
                digest.update(piece)
                if path == MANIFEST_NAME:
                    kept += piece[: MANIFEST_BYTES + 1 - len(kept)]
            if path == MANIFEST_NAME:
                manifest_bytes = bytes(kept)
            content = digest.hexdigest()
            files.append((path, member.size, content))
            unpacked_bytes += member.size
        else:
            content = member.target.decode(errors="backslashreplace")
            others[path] = member.kind
        listing.append((path, member.kind, content, member.executable))
    listing.sort()
    return ArchiveSummary(
        manifest_bytes=manifest_bytes,
        files=tuple(files),
        others=others,
        unpacked_bytes=unpacked_bytes,
        digest=hashlib.sha256(canonical(listing)).hexdigest(),
    )


def check_entrypoint(summary: ArchiveSummary, manifest: Manifest) -> None:
    """The entrypoint is a regular file of the archive, met without following a link.

    Raises: InvalidInput saying what it is instead; where a directory was packed with its own name, the path to use.
    """
    wanted = manifest.entrypoint
    if any(path == wanted for path, _, _ in summary.files):
        return
    kind = summary.others.get(wanted)
    if kind is not None:
        what = "a symbolic link" if kind == SYMLINK else "a directory"
        raise InvalidInput("entrypoint", f"{show(wanted)} is {what} in the archive; accepted: a regular file")
    parent = wanted
    while parent := parent.rpartition("/")[0]:
        if summary.others.get(parent) == SYMLINK:
            raise InvalidInput("entrypoint", f"{show(wanted)} lies behind the symbolic link {show(parent)}")
    top = {path.partition("/")[0] for path, _, _ in summary.files}
    if len(top) == 1 and any(path == f"{next(iter(top))}/{wanted}" for path, _, _ in summary.files):
        raise InvalidInput("entrypoint", f"{show(wanted)} is not in the archive; {show(f'{top.pop()}/{wanted}')} is")
    raise InvalidInput("entrypoint", f"{show(wanted)} is not in the archive")


def build_archive(files: Mapping[str, bytes]) -> bytes:
    """A plain tar of `files`, path -> content, for the sandbox to unpack. What begins as `#!` or ELF is executable.

    Raises: InvalidInput naming the path: it breaks a rule of `check_path`, stands twice, or is a file and a directory.
    """
    if len(files) > ARCHIVE_MEMBERS:
        raise InvalidInput("files", f"has {len(files)} files; accepted: at most {ARCHIVE_MEMBERS}")
    total = sum(map(len, files.values()))
    if total > ARCHIVE_BYTES:
        raise InvalidInput("files", f"has {total} bytes; accepted: at most {ARCHIVE_BYTES}")
    parts: list[bytes] = []
    paths: set[str] = set()
    directories: set[str] = set()
    for given, content in files.items():
        path = check_path(given, "files")
        if path in paths:
            raise InvalidInput("files", f"{show(path)} stands twice")
        paths.add(path)
        parent = path.rpartition("/")[0]
        while parent and parent not in directories:
            directories.add(parent)
            if len(directories) > IMPLIED_DIRECTORIES:
                raise InvalidInput("files", f"{show(path)} is one directory too many; accepted: {IMPLIED_DIRECTORIES}")
            parent = parent.rpartition("/")[0]
        name = path.encode("utf-8", "surrogateescape")
        if len(name) > 100:
            record = _pax_record(b"path", name)
            parts += (_header(b"long name", len(record), b"x"), record, bytes(-len(record) % _BLOCK))
            name = b"long name"
        mode = b"0000755" if content.startswith(_EXECUTABLE) else b"0000644"
        parts += (_header(name, len(content), b"0", mode), content, bytes(-len(content) % _BLOCK))
    for path in paths & directories:
        raise InvalidInput("files", f"{show(path)} is a file, and a directory of another")
    parts.append(bytes(2 * _BLOCK))
    return b"".join(parts)


def _header(name: bytes, size: int, kind: bytes, mode: bytes = b"0000644") -> bytes:
    fields = (name, mode, b"0000000", b"0000000", b"%011o" % size, b"00000000000")
    rest = (kind, b"", b"ustar", b"00", b"", b"", b"0000000", b"0000000", b"")
    total = sum(_HEADER.pack(*fields, b" " * 8, *rest))
    return _HEADER.pack(*fields, b"%06o\0 " % total, *rest)


def _pax_record(key: bytes, value: bytes) -> bytes:
    """`LENGTH key=value\\n`, where the length counts its own digits. pax(1)."""
    bare = len(key) + len(value) + 3
    length = bare + len(str(bare))
    length = bare + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)
