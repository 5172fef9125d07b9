"""Unpacking inside the sandbox, as the job's user, behind all its walls and before any of its programs runs.

The tree is empty at the start and nobody else writes to it; `sandbox.tar` lets no member lie below a link. O_EXCL and
O_NOFOLLOW hold even if either were false.
"""

from __future__ import annotations

import os

from sandrun.sandbox.tar import DIRECTORY, FILE, Archive

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def unpack(archive_fd: int, directory: str) -> int:
    """Make what the archive holds below `directory`; returns the bytes of all files.

    Files are 0644, or 0755 if they were executable for anybody; directories 0755. Leaves the process' umask at 022.
    Raises: BadArchive; OSError: ENOSPC (the tmpfs is full), EEXIST (the directory was not empty).
    """
    total = 0
    os.umask(0o022)
    archive = Archive(archive_fd)
    root = os.open(directory, _DIRECTORY_FLAGS)
    try:
        for member in archive:
            if member.kind == FILE:
                fd = os.open(member.path, _FILE_FLAGS, 0o755 if member.executable else 0o644, dir_fd=root)
                try:
                    for piece in archive.content():
                        written = os.write(fd, piece)
                        while written < len(piece):  # a nearly full tmpfs writes a part, then fails
                            written += os.write(fd, piece[written:])
                finally:
                    os.close(fd)
                total += member.size
            elif member.kind == DIRECTORY:
                os.mkdir(member.path, 0o755, dir_fd=root)
            else:
                os.symlink(member.target, member.path, dir_fd=root)
    finally:
        os.close(root)
    return total
