"""Bounds on what a client sends that hold inside a sandbox too, where `sandrun.model` is too much to load."""

ARCHIVE_MEMBERS = 1000
ARCHIVE_BYTES = 100 << 20
"""The most an archive may hold, packed and, counted apart, unpacked (the customer's 100 MB are MiB)."""
PATH_BYTES = 4000
"""The most a path below the work directory may have: with that before it, less than PATH_MAX."""
COMPONENT_BYTES = 255
