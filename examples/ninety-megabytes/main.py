"""Hashes a large file in blocks and counts its bytes by value, without holding it in memory."""

import hashlib
import json
import sys

digest = hashlib.sha256()
zeros = size = 0
with open(sys.argv[1], "rb") as file:
    while block := file.read(1 << 20):
        digest.update(block)
        zeros += block.count(0)
        size += len(block)
report = {"bytes": size, "zeros": zeros, "sha256": digest.hexdigest()}
with open("report.json", "w") as file:
    json.dump(report, file)
print(report)
