"""Reads every file in numbers/ and writes one with the square of its number for each."""

import pathlib

squares = pathlib.Path("squares")
squares.mkdir()
total = 0
files = sorted(pathlib.Path("numbers").iterdir())
for file in files:
    number = int(file.read_text())
    (squares / file.name).write_text(f"{number * number}\n")
    total += number * number
print(f"{len(files)} files, the squares add up to {total}")
