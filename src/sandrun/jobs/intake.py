"""Turning what a client sent into a job's input: looked at, refused by name, or put into memory files. For threads."""

from __future__ import annotations

import hashlib

from sandrun.errors import InvalidInput
from sandrun.jobs.archive import build_archive, check_archive, check_entrypoint
from sandrun.jobs.job import Input, InputFile
from sandrun.jobs.memfile import sealed
from sandrun.jobs.request import RunRequest
from sandrun.model import MIB, SPARE_MEMORY_BYTES, Ceilings, Manifest, parse_manifest


def check_upload(
    given: Input, manifest: Manifest | bytes | None, ceilings: Ceilings
) -> tuple[Manifest, tuple[InputFile, ...]]:
    """Read an upload's manifest and archive, and put the job's input into a memory file of its own. For a thread.

    Raises: InvalidInput naming the field or the archive's member.
    """
    if isinstance(manifest, bytes):
        manifest = parse_manifest(manifest, ceilings)
    summary = check_archive(given.archive_fd)
    if manifest is None:
        if summary.manifest_bytes is None:
            raise InvalidInput("manifest", "is missing: send a part `manifest`, or job.json in the archive")
        manifest = parse_manifest(summary.manifest_bytes, ceilings)
    check_entrypoint(summary, manifest)
    check_room(manifest, summary.unpacked_bytes)
    add_stdin(given, manifest)
    return manifest, tuple(InputFile(path=path, size=size, sha256=digest) for path, size, digest in summary.files)


def pack_request(given: Input, request: RunRequest) -> tuple[InputFile, ...]:
    """Make memory files out of a request's files and input. For a thread when they are large. Raises: InvalidInput."""
    check_room(request.manifest, sum(map(len, request.files.values())))
    archive = build_archive(request.files)
    given.archive_fd = sealed("archive", archive)
    given.archive_bytes = len(archive)
    add_stdin(given, request.manifest)
    return tuple(
        InputFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in request.files.items()
    )


def check_room(manifest: Manifest, unpacked_bytes: int) -> None:
    """Files are held in the job's own memory. Raises: InvalidInput if they leave too little of it."""
    needed = unpacked_bytes + SPARE_MEMORY_BYTES
    if needed > manifest.memory_mb * MIB:
        raise InvalidInput(
            "memory_mb",
            f"{manifest.memory_mb} is too small: the files unpack to {unpacked_bytes} bytes in the job's own memory, "
            f"which with {SPARE_MEMORY_BYTES // MIB} MiB to spare takes {-(-needed // MIB)}",
        )


def add_stdin(given: Input, manifest: Manifest) -> None:
    if manifest.stdin:
        given.stdin_fd = sealed("stdin", manifest.stdin)
        given.stdin_bytes = len(manifest.stdin)
