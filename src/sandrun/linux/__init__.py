"""One small module per kernel facility, and the only home of ctypes.

Nothing here has heard of a job. Every function has a Python signature and raises OSError whose text names the call, the
object and the kernel's answer. Standard library alone: this code runs with privilege, and after a fork.
"""
