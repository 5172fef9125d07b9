"""Computes the Mandelbrot set row by row with a pool of workers and writes it as a picture (PGM)."""

import multiprocessing
import sys

WIDTH, HEIGHT, DEPTH = 320, 240, 60


def begin(started, together):
    """Runs once in each worker: none begins before all are there."""
    with started.get_lock():
        started.value += 1
    together.wait(timeout=30)


def row(y):
    """One line of the picture."""
    line = bytearray()
    for x in range(WIDTH):
        point = complex(-2.2 + 3.2 * x / WIDTH, -1.2 + 2.4 * y / HEIGHT)
        z, steps = 0j, 0
        while abs(z) <= 2 and steps < DEPTH:
            z, steps = z * z + point, steps + 1
        line.append(255 - 255 * steps // DEPTH)
    return bytes(line)


if __name__ == "__main__":
    workers = int(sys.argv[1])
    started = multiprocessing.Value("i", 0)
    together = multiprocessing.Barrier(workers)
    with multiprocessing.Pool(workers, begin, (started, together)) as pool:
        lines = pool.map(row, range(HEIGHT), chunksize=4)
    with open("mandelbrot.pgm", "wb") as picture:
        picture.write(b"P5 %d %d 255\n" % (WIDTH, HEIGHT) + b"".join(lines))
    print(f"{len(lines)} rows by {started.value} workers")
