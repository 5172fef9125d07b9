"""A strict reader of untrusted tar archives, plain or gzip'd: requirement 27.

One reader serves both admission (`jobs.archive`) and unpacking inside the sandbox (`sandbox.unpack`), so there is no
second parser to disagree with. What two tar programs could read differently is refused, not guessed: a size told twice,
a name after a NUL, a directory with content. Sources: POSIX.1-2017 pax(1), "ustar" and "pax" formats; GNU tar manual,
"Basic Tar Format".
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from struct import Struct

from sandrun.bounds import ARCHIVE_BYTES, ARCHIVE_MEMBERS, COMPONENT_BYTES, PATH_BYTES
from sandrun.errors import InvalidInput

FILE = "file"
DIRECTORY = "directory"
SYMLINK = "symlink"

IMPLIED_DIRECTORIES = ARCHIVE_MEMBERS
"""The most directories made only because a member lies below them: else 1000 long names would make a million."""
EXTENDED_BYTES = 4 << 20
"""The most that pax headers and GNU long names may have, all together."""
TAIL_BYTES = 1 << 20
"""The most zeros after the last member; GNU tar pads to its blocking factor, 10 KiB unless told otherwise."""

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_HEADER = Struct("100s8s16x12s12x8sc100s8s80x155s12x")  # name mode size checksum type linkname magic prefix
_CONTROLS = bytes([*range(32), 127])
_POSIX, _GNU, _V7 = b"ustar\0", b"ustar  \0", bytes(8)
_PACKED_BYTES = 64 << 10
_PIECE_BYTES = 256 << 10
_GZIP = b"\x1f\x8b"
_REFUSED_TYPES = {  # by typeflag
    b"1": "is a hard link; pack with tar --hard-dereference",
    b"3": "is a character device",
    b"4": "is a block device",
    b"6": "is a FIFO",
    b"S": "is a sparse file; pack without --sparse",
}


class BadArchive(InvalidInput):
    """The archive breaks a rule.

    Attributes:
        member: the member at fault, printable; empty if it is the archive as a whole.
    """

    def __init__(self, member: str, details: str) -> None:
        super().__init__("files", f"{member}: {details}" if member else f"the archive {details}")
        self.member = member


class Member:
    """One thing to make.

    Attributes:
        path: relative, in normal form (no empty, `.` or `..` component), without control characters; not always UTF-8.
        kind: FILE, DIRECTORY or SYMLINK.
        size: bytes of content; 0 unless a file.
        executable: whether anybody may execute the file; all else of its mode is dropped.
        target: what a symbolic link says; it stays inside the archive whatever other links there are.
    """

    __slots__ = ("executable", "kind", "path", "size", "target")

    def __init__(self, path: bytes, kind: str, size: int = 0, executable: bool = False, target: bytes = b"") -> None:
        self.path = path
        self.kind = kind
        self.size = size
        self.executable = executable
        self.target = target


class Archive:
    """The members of the archive in `fd`, which is read by offset from 0 and left open; its own position stays.

    Iterate once; `content` gives what the member just met holds. Parents always come before what they hold: directories
    that the archive only implies are made up. Memory use is bounded, by some 10 MiB, whatever the archive says.
    Raises: BadArchive out of either iterator; OSError.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._name = b""
        self._buffer = b""
        self._at = 0
        self._left = 0  # of the present member's content
        self._padding = 0
        self._members = 0
        self._content_bytes = 0
        self._extended_bytes = 0
        self._kinds: dict[bytes, str] = {b"": DIRECTORY}
        self._implied = {b""}
        first = os.pread(fd, _PACKED_BYTES, 0)
        self.gzipped = first[:2] == _GZIP
        self._pieces = self._inflated(first) if self.gzipped else self._plain(first)

    def __iter__(self) -> Iterator[Member]:
        while True:
            self._skip()
            self._name = b""
            block = self._take(_BLOCK, "has no end mark: it is cut short, or not a tar archive")
            records: dict[bytes, bytes] = {}
            while True:
                if block == _ZEROS:
                    if records:
                        raise self._bad("ends after an extended header, before the member that it tells of")
                    self._finish()
                    return
                name, mode, size_field, checksum, kind, link, magic, prefix = _HEADER.unpack(block)
                self._name = name.rstrip(b"\0")
                # Adler-32 sums bytes modulo 65521, so it is exact for half a header: 256 x 255 = 65280.
                total = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
                if total - sum(checksum) + 8 * 32 != self._octal(checksum, "checksum"):
                    raise self._bad("has a wrong checksum, so this is no tar archive or a damaged one")
                size = self._octal(size_field, "size")
                if kind not in b"xgLK":
                    break
                self._extend(records, kind, size)
                block = self._take(_BLOCK, "ends after an extended header")
            if magic[:6] == _POSIX:
                if prefix := prefix.rstrip(b"\0"):
                    self._name = prefix + b"/" + self._name
            elif (magic != _GNU and magic != _V7) or prefix.strip(b"\0"):
                raise self._bad("has no ustar, pax or GNU header")
            link = link.rstrip(b"\0")
            if records:
                self._name = records.get(b"path", self._name)
                link = records.get(b"linkpath", link)
                # Programs that disagree which size counts see other members: how files are smuggled past a check.
                if int(records.get(b"size", size)) != size:
                    raise self._bad("has two different sizes")
            self._members += 1
            if self._members > ARCHIVE_MEMBERS:
                raise self._bad(f"is one too many; accepted: at most {ARCHIVE_MEMBERS} members")
            yield from self._member(kind, size, link, mode)

    def content(self) -> Iterator[memoryview]:
        """The content of the member just met, in pieces of at most 256 KiB. What is not taken is skipped."""
        while self._left:
            if self._at == len(self._buffer):
                self._refill("ends inside this member")
            piece = memoryview(self._buffer)[self._at : self._at + self._left]
            self._at += len(piece)
            self._left -= len(piece)
            yield piece

    # ---- headers ---------------------------------------------------------------------------------------

    def _member(self, kind: bytes, size: int, link: bytes, mode: bytes) -> Iterator[Member]:
        raw = self._name
        slashed = raw.rpartition(b"/")[2] in (b"", b".")
        if kind == b"5" or (kind == b"\0" and raw[-1:] == b"/"):  # so old tars wrote directories
            path, made = self._path(raw), Member(b"", DIRECTORY)
        elif kind == b"0" or kind == b"\0":
            path, made = self._path(raw), Member(b"", FILE, size, self._octal(mode, "mode") & 0o111 != 0)
        elif kind == b"2":
            path, made = self._path(raw), Member(b"", SYMLINK, target=link)
            self._check_target(link, path.count(b"/"))
        else:
            raise self._bad(_REFUSED_TYPES.get(kind, f"has the unknown type {kind!r:.9}"))
        if made.kind != DIRECTORY and (slashed or not path):
            raise self._bad(f"is a {made.kind} with the name of a directory")
        if made.kind != FILE and size:
            raise self._bad(f"is a {made.kind} with content")
        self._content_bytes += size
        if self._content_bytes > ARCHIVE_BYTES:
            raise self._bad(f"makes it more than {ARCHIVE_BYTES} bytes unpacked, which is the most accepted")
        parent = path.rpartition(b"/")[0]
        if self._kinds.get(parent) != DIRECTORY:
            yield from self._parents(parent)
        known = self._kinds.get(path)
        if known is None:
            self._kinds[path] = made.kind
        elif known == made.kind == DIRECTORY and path in self._implied:
            self._implied.remove(path)
            return
        elif known == made.kind:
            raise self._bad("is there twice")
        else:
            raise self._bad(f"is a {made.kind} here and a {known} before")
        made.path = path
        self._left = size
        self._padding = -size % _BLOCK
        yield made

    def _parents(self, path: bytes) -> list[Member]:
        """The directories down to `path` that no member has named yet, topmost first."""
        missing = []
        while (known := self._kinds.get(path)) is None:
            missing.append(path)
            if len(self._implied) + len(missing) > IMPLIED_DIRECTORIES:
                raise self._bad(f"lies too deep; accepted: {IMPLIED_DIRECTORIES} directories that are no members")
            path = path.rpartition(b"/")[0]
        if known != DIRECTORY:
            raise self._bad(f"lies below {_show(path)}, which is a {known}")
        missing.reverse()
        self._implied.update(missing)
        self._kinds.update(dict.fromkeys(missing, DIRECTORY))
        return [Member(path, DIRECTORY) for path in missing]

    def _path(self, raw: bytes) -> bytes:
        self._check_text(raw, "name")
        if raw[0] == 47:
            raise self._bad("has an absolute name")
        parts = [part for part in raw.split(b"/") if part and part != b"."]
        if b".." in parts:
            raise self._bad("has a component '..' in its name")
        if len(raw) > COMPONENT_BYTES and any(len(part) > COMPONENT_BYTES for part in parts):
            raise self._bad(f"has a component of more than {COMPONENT_BYTES} bytes in its name")
        return b"/".join(parts)

    def _check_target(self, raw: bytes, depth: int) -> None:
        """A link may climb at its start only, through real directories: `a/../..` leaves the tree if `a` is a link."""
        self._check_text(raw, "target")
        if raw[0] == 47:
            raise self._bad("is a symbolic link to an absolute path")
        parts = [part for part in raw.split(b"/") if part and part != b"."]
        climbs = parts.count(b"..")
        if climbs > depth:
            raise self._bad("is a symbolic link that leaves the archive")
        if b".." in parts[climbs:]:
            raise self._bad("is a symbolic link with '..' after a name; accepted: only at the start")

    def _check_text(self, raw: bytes, what: str) -> None:
        if not raw:
            raise self._bad(f"has an empty {what}")
        if len(raw) > PATH_BYTES:
            raise self._bad(f"has a {what} of more than {PATH_BYTES} bytes")
        if len(raw.translate(None, _CONTROLS)) != len(raw):
            raise self._bad(f"has a control character in its {what}")
        if not raw.isascii() and any("\x80" <= character <= "\x9f" for character in raw.decode(errors="replace")):
            raise self._bad(f"has a control character in its {what}")

    def _octal(self, field: bytes, what: str) -> int:
        digits = field.strip(b" \0")
        try:
            if digits.isdigit():
                return int(digits, 8)
        except ValueError:
            pass
        raise self._bad(f"has no octal number as its {what}")

    # ---- extended headers ------------------------------------------------------------------------------

    def _extend(self, records: dict[bytes, bytes], kind: bytes, size: int) -> None:
        """Read a pax header or a GNU long name into `records`: path, linkpath, size."""
        self._extended_bytes += _BLOCK + size
        if self._extended_bytes > EXTENDED_BYTES:
            raise self._bad(f"makes extended headers more than {EXTENDED_BYTES} bytes, which is the most accepted")
        payload = self._take(size, "ends inside an extended header")
        self._take(-size % _BLOCK, "ends inside an extended header")
        if kind == b"L" or kind == b"K":
            if payload[-1:] != b"\0":  # GNU tar reads on to the next NUL, whatever the size
                raise self._bad("has a malformed long name")
            found = {b"path" if kind == b"L" else b"linkpath": payload.rstrip(b"\0")}
        else:
            found = self._pax(payload)
            if kind == b"g" and found:
                raise self._bad("is a global header that names or sizes members")
            found.setdefault(b"", b"")  # so that a second one, even without a word of ours, is met below
            if kind == b"g":
                return
        for key, value in found.items():
            if key in records:
                raise self._bad("has two extended headers of one kind")
            records[key] = value

    def _pax(self, payload: bytes) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        at, end = 0, len(payload)
        while at < end:
            space = payload.find(b" ", at, at + 8)
            digits = payload[at:space] if space > 0 else b""
            stop = at + int(digits) if digits.isdigit() and digits[0] != 48 else 0
            equals = payload.find(b"=", space + 1, stop)
            if equals <= space + 1 or stop > end or payload[stop - 1] != 10:
                raise self._bad("has a malformed pax header")
            key = payload[space + 1 : equals]
            if key in (b"path", b"linkpath", b"size"):
                value = payload[equals + 1 : stop - 1]
                if key in found or not value or (key == b"size" and not (value.isdigit() and len(value) < 16)):
                    raise self._bad(f"has a malformed pax record {key.decode()}")
                found[key] = value
            elif key.startswith((b"GNU.sparse", b"SCHILY.realsize")):
                raise self._bad(_REFUSED_TYPES[b"S"])
            at = stop
        return found

    # ---- bytes -----------------------------------------------------------------------------------------

    def _plain(self, piece: bytes) -> Iterator[bytes]:
        at = 0
        while piece:
            yield piece
            at += len(piece)
            piece = os.pread(self._fd, _PACKED_BYTES, at)

    def _inflated(self, packed: bytes) -> Iterator[bytes]:
        inflater = zlib.decompressobj(31)  # one gzip member; its CRC and length are checked
        at = 0
        while packed:
            at += len(packed)
            while True:
                try:
                    piece = inflater.decompress(packed, _PIECE_BYTES)
                except zlib.error as error:
                    raise self._bad(f"is damaged: {error}") from None
                if piece:
                    yield piece
                if inflater.eof:
                    if inflater.unused_data or os.pread(self._fd, 1, at):
                        self._name = b""
                        raise self._bad("has data after the end of its gzip member; accepted: one member, nothing else")
                    return
                packed = inflater.unconsumed_tail
                if not packed and len(piece) < _PIECE_BYTES:  # a full piece may have more behind it without input
                    break
            packed = os.pread(self._fd, _PACKED_BYTES, at)
        raise self._bad("is cut short inside the gzip data")

    def _refill(self, complaint: str) -> None:
        self._buffer = next(self._pieces, b"")
        self._at = 0
        if not self._buffer:
            raise self._bad(complaint)

    def _take(self, count: int, complaint: str) -> bytes:
        end = self._at + count
        if end <= len(self._buffer):
            taken = self._buffer[self._at : end]
            self._at = end
            return taken
        parts = [self._buffer[self._at :]]
        count -= len(parts[0])
        while count:
            self._refill(complaint)
            parts.append(self._buffer[:count])
            self._at = len(parts[-1])
            count -= self._at
        return b"".join(parts)

    def _skip(self) -> None:
        left = self._left + self._padding
        self._left = self._padding = 0
        while left > (here := len(self._buffer) - self._at):
            left -= here
            self._refill("ends inside this member")
        self._at += left

    def _finish(self) -> None:
        """Nothing but zeros may follow the first block of zeros, and at least one more block of them."""
        self._name = b""
        zeros = _BLOCK
        rest = self._buffer[self._at :]
        while True:
            zeros += len(rest)
            if rest.strip(b"\0"):
                raise self._bad("has data after its end mark")
            if zeros > TAIL_BYTES:
                raise self._bad(f"has more than {TAIL_BYTES} bytes of padding after its end mark")
            if not (rest := next(self._pieces, b"")):
                break
        self._buffer, self._at = b"", 0
        if zeros < 2 * _BLOCK or zeros % _BLOCK:
            raise self._bad("is cut short inside its end mark")

    def _bad(self, details: str) -> BadArchive:
        return BadArchive(_show(self._name), details)


def _show(name: bytes) -> str:
    """A name for an error message: bounded, printable. Not `model.show`, which takes text."""
    text = name[:200].decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" for c in text)
    return text if len(name) <= 200 else text + "…"
