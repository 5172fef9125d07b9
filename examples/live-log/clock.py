"""Prints a line four times a second for as many seconds as it is told, now and then one on standard error."""

import sys
import time

seconds = int(sys.argv[1])
start = time.monotonic()
for tick in range(4 * seconds):
    time.sleep(max(0.0, start + tick / 4 - time.monotonic()))
    print(f"tick {tick} at {time.monotonic() - start:.2f} s", flush=True)
    if tick % 10 == 9:
        print(f"{tick + 1} ticks so far", file=sys.stderr)
time.sleep(max(0.0, start + seconds - time.monotonic()))
print("done")
