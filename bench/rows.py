"""Every row of the tables: what it must reach, as ratios within one run."""

from __future__ import annotations

from bench.figures import AT_LEAST, Row

ROWS = (
    Row("hello", "latency", 'POST /run of print("hello"), kept-alive connection, p50', "× bare p50", 0.25, goal=0.18),
    Row("hello-p99", "latency", "the same, p99", "× bare p50", 0.8),
    Row("hello-bubblewrap", "latency", "the same, p50, beside bubblewrap", "× bubblewrap p50"),
    Row("numpy", "numpy", "POST /run of import numpy in the environment `data`, p50", "× bare p50", 0.045),
    Row("cold", "cold", "POST /run of hello when no sandbox is parked, p50", "× bare p50", 0.6),
    Row("submit", "submit", "POST /submit of 10 files until completed and its output listed, p50", "× bare hello", 1.0),
    Row("bash", "executed", "POST /run of a bash job, p50", "× bubblewrap p50", 0.8),
    Row("perl", "executed", "POST /run of a perl job, p50", "× bubblewrap p50", 0.8),
    Row("sh", "executed", "POST /run of a sh job, p50", "× bubblewrap p50", 1.3),
    Row("fresh", "executed", "POST /run of hello with fresh_interpreter, p50", "× bubblewrap p50", 1.3),
    Row("node", "executed", "POST /run of a node job, p50", "× bare node p50", 1.1),
    Row("node-bubblewrap", "executed", "the same beside bubblewrap", "× bubblewrap p50", 1.3),
    Row("loop", "inside", "a loop in pure Python, inside ÷ outside", "×", 1.02),
    Row("getppid", "inside", "a million getppid, inside ÷ outside", "×", 1.15),
    Row("files", "inside", "10,000 small files written, read, removed, inside ÷ outside", "×", 1.05),
    Row("cpu", "cost", "CPU time of a hello job over HTTP, all processes and the kernel", "CPU-ms", 5.0, goal=4.0),
    Row("cpu-processes", "cost", "the same by the times of the server's own processes and sandboxes", "CPU-ms"),
    Row("cpu-ratio", "cost", "the same beside the bare interpreter", "× bare"),
    Row("server-memory", "memory", "supervisor, api, spawner and zygote, Pss", "MiB", 150),
    Row("parked", "parked", "a parked sandbox, by MemAvailable", "MiB", 2.5, goal=2.0),
    Row("upload", "uploads", "90 MB: hashing and writing to a memfd ÷ POST /submit", "×", 0.6, AT_LEAST),
    Row("unpack", "uploads", "the same unpacked inside ÷ tar xzf into tmpfs", "×", 1.3),
    Row("rate", "throughput", "hello jobs/s over HTTP, 8 clients", "× best bare rate", 1.5, AT_LEAST, goal=2.0),
    Row("clients-rate", "clients", "rate at 256 clients ÷ best rate of 2 to 256", "×", 0.8, AT_LEAST),
    Row("clients-p99", "clients", "p99 ÷ (clients ÷ rate), worst of 2 to 256 clients", "×", 1.5),
    Row("sleepers", "sleepers", "1,000 jobs asleep at once: that succeed", "%", 100, AT_LEAST),
    Row("sleepers-memory", "sleepers", "one of them, by MemAvailable", "MiB", 4.0),
    Row("sleepers-hello", "sleepers", "a new hello's p50 beside them", "× idle p50", 3.0),
    Row("queued", "queued", "10,000 jobs of 1 KB queued: that succeed", "%", 100, AT_LEAST),
    Row("queued-memory", "queued", "what api grows by while they wait, Pss", "MiB", 60),
    Row("queued-return", "queued", "what is left of that when they are erased", "MiB", 5),
    Row("leaks-5000", "leaks", "processes, mounts, cgroups, namespaces, descriptors too many after 5,000 jobs", "", 0),
    Row("leaks-5000-memory", "leaks", "Pss of all, against that after the first 500", "MiB", 5),
    Row("leaks-50000", "leaks", "the same count after 50,000 jobs", "", 0),
    Row("leaks-50000-memory", "leaks", "Pss of all, against that after the first 1,000", "MiB", 5),
    Row("leaks-50000-slab", "leaks", "slab of the kernel, against that after the first 1,000", "MiB", 5),
    Row("leaks-50000-latency", "leaks", "hello ÷ bare, last against first thousand", "×", 1.15),
    Row("spam", "spam", "hello's p50 while another job prints without end", "× idle p50", 2.0),
    Row("spam-memory", "spam", "what the server grows by meanwhile, its log being full, Pss", "MiB", 5),
    Row("subscribers", "subscribers", "a log line's way to 100 WebSocket subscribers, p99", "ms", 50),
    Row("subscribers-lost", "subscribers", "lines that one of them missed", "", 0),
    Row("subscribers-gap", "subscribers", "stalled subscribers that were told of their gap", "of 1", 1, AT_LEAST),
)

BY_NAME = {row.name: row for row in ROWS}
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS))


def choose(names: list[str]) -> list[str]:
    """The groups that these rows or groups are in, in order. Raises: KeyError with the name that is neither."""
    wanted = {name if name in GROUPS else BY_NAME[name].group for name in names}
    return [group for group in GROUPS if not names or group in wanted]
