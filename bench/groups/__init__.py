"""What is measured: each module has groups, functions that give `Figure`s."""
