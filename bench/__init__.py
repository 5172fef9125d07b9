"""The benchmark: Sandrun beside what a user would otherwise pick, in one interleaved run. `./scripts/bench --help`."""
