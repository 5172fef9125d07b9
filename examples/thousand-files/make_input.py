"""Makes the small files that main.py reads: `python3 make_input.py` writes numbers/0000.txt and on, 997 of them.

With main.py, this file and job.json they are 1000, the most that an archive may hold.
"""

import os
import sys

folder = os.path.join(sys.argv[1] if len(sys.argv) > 1 else ".", "numbers")
os.makedirs(folder, exist_ok=True)
for number in range(997):
    with open(os.path.join(folder, f"{number:04}.txt"), "w") as file:
        file.write(f"{number}\n")
