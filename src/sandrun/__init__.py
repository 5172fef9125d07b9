"""Sandrun runs untrusted code behind every wall that the Linux kernel offers."""

__version__ = "0.1.0"
