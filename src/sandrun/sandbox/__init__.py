"""What a sandbox is: its root, its walls in order, its allow-list, and PID 1 inside it. Standard library only."""
