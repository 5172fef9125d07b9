"""Makes the large file that main.py reads: `python3 make_input.py` writes data.bin, 90 MB that do not compress."""

import os
import random
import sys

MEGABYTE = 1_000_000
source = random.Random(90)
with open(os.path.join(sys.argv[1] if len(sys.argv) > 1 else ".", "data.bin"), "wb") as file:
    file.writelines(source.randbytes(MEGABYTE) for _ in range(90))
