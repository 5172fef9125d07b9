"""What a job writes to its streams: kept up to a bound, read to the end, never in the way of the job or the server."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time

import pytest

from sandrun.model import LOG_BYTES, MIB
from tests import host, serving
from tests.escape.limits import metadata, resident
from tests.serving import Api

pytestmark = pytest.mark.requirement(33)


def exact(api: Api, job_id: str, stream: str) -> bytes:
    answer = api.http.get(f"/logs/{job_id}", params={"stream": stream}, headers={"accept": "application/octet-stream"})
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_ten_megabytes_are_kept_and_the_rest_is_drained(stream: str, api: Api) -> None:
    """It counts what it writes, so that what is kept can be told from what is lost; the job never waits."""
    code = f"""
import sys
line = b"%015d\\n"
for block in range(30):
    sys.{stream}.buffer.write(b"".join(line % (block * 65536 + number) for number in range(65536)))
open("done", "w").write("all of it")
"""
    job_id = api.submit({"main.py": code}, entrypoint="main.py", timeout=60)
    result = api.wait(job_id)
    other = "stderr" if stream == "stdout" else "stdout"
    assert (result["outcome"], result["exit_code"]) == ("exited", 0)
    assert result["truncated"] == {stream: 20 * MIB, other: 0}
    assert result["limits_hit"] == ["output"]
    assert [file["path"] for file in result["output_files"]] == ["done"]
    kept = exact(api, job_id, stream)
    assert len(kept) == LOG_BYTES
    assert kept == b"".join(b"%015d\n" % number for number in range(LOG_BYTES // 16))
    assert exact(api, job_id, other) == b""
    assert api.http.delete(f"/jobs/{job_id}").status_code == 204


def test_both_streams_are_bounded_apart(api: Api) -> None:
    code = """
import sys
for _ in range(12):
    sys.stdout.buffer.write(b"o" * (1 << 20)); sys.stderr.buffer.write(b"e" * (1 << 20))
"""
    result = api.run(code, timeout=60)
    assert result["truncated"] == {"stdout": 2 * MIB, "stderr": 2 * MIB}
    assert (result["stdout"], result["stderr"]) == ("o" * LOG_BYTES, "e" * LOG_BYTES)


def test_exactly_ten_megabytes_have_not_met_the_bound(api: Api) -> None:
    result = api.run("import sys; sys.stdout.write('x' * (10 << 20))", timeout=60)
    assert (len(result["stdout"]), result["truncated"]["stdout"], result["limits_hit"]) == (LOG_BYTES, 0, [])


def test_endless_output_ends_with_the_job(api: Api, running_server: serving.Server) -> None:
    """Two gigabytes a second come from `yes`; the server does not grow by what it drops, and answers others."""
    part = running_server.part("api").pid
    api.run("import sys; sys.stdout.write('x' * (11 << 20))")
    before = resident(part)
    job_id = api.submit({"main.sh": "yes 2>/dev/null"}, entrypoint="main.sh", timeout=2)
    slowest, most = 0.0, 0
    end = time.monotonic() + 2
    while time.monotonic() < end:
        began = time.monotonic()
        assert api.http.get("/health").status_code == 200
        slowest = max(slowest, time.monotonic() - began)
        most = max(most, resident(part))
    result = api.wait(job_id)
    assert result["outcome"] == "timeout"
    assert result["truncated"]["stdout"] > 10 * MIB
    assert exact(api, job_id, "stdout") == b"y\n" * (LOG_BYTES // 2)
    assert most < before + 64 * MIB
    assert slowest < host.within(1)
    assert api.http.delete(f"/jobs/{job_id}").status_code == 204


def test_job_does_not_wait_for_a_reader_who_reads_nothing(api: Api) -> None:
    """Somebody follows the log and never reads on."""
    code = "import sys, time; time.sleep(0.5)\nfor _ in range(200): sys.stdout.write('x' * 65536)\n"
    job_id = api.submit({"main.py": code}, entrypoint="main.py", timeout=60)
    with api.http.stream("GET", f"/logs/{job_id}/stream") as stalled:
        assert stalled.status_code == 200
        began = time.monotonic()
        result = api.wait(job_id)
        assert time.monotonic() - began < host.within(20)
    assert (result["outcome"], result["exit_code"]) == ("exited", 0)
    assert metadata(result)["wall_seconds"] < host.within(10)


def test_invalid_utf8_is_replaced_in_text_and_kept_in_bytes(api: Api) -> None:
    sent = bytes(range(256)) * 4 + "…é\n".encode() + b"\xc3"
    code = f"import sys; sys.stdout.buffer.write({sent!r})"
    job_id = api.submit({"main.py": code}, entrypoint="main.py")
    api.wait(job_id)
    assert exact(api, job_id, "stdout") == sent
    assert api.logs(job_id) == sent.decode(errors="replace")
    answer = api.http.get(f"/logs/{job_id}", headers={"accept": "application/json"}).json()
    assert answer["stdout"] == sent.decode(errors="replace")
    assert answer["next"]["stdout"] == len(sent)
    frames = [
        json.loads(line[6:])
        for line in api.http.get(f"/logs/{job_id}/stream").text.splitlines()
        if line.startswith("data: ")
    ]
    told = b"".join(
        base64.b64decode(frame["base64"]) if "base64" in frame else frame["text"].encode()
        for frame in frames
        if "offset" in frame
    )
    assert told == sent


def test_character_that_is_written_in_two_halves_is_one(api: Api) -> None:
    code = """
import os, time
for byte in "é…😀\\n".encode():
    os.write(1, bytes([byte]))
    time.sleep(0.02)
"""
    job_id = api.submit({"main.py": code}, entrypoint="main.py")
    text = ""
    with api.http.stream("GET", f"/logs/{job_id}/stream") as stream:
        for line in stream.iter_lines():
            if line.startswith("data: ") and "text" in (frame := json.loads(line[6:])):
                text += frame["text"]
    assert text == "é…😀\n"


def test_line_of_eight_megabytes_survives(api: Api) -> None:
    code = "import sys; sys.stdout.write('x' * (8 << 20) + '\\nshort\\n')"
    job_id = api.submit({"main.py": code}, entrypoint="main.py")
    result = api.wait(job_id)
    assert result["limits_hit"] == []
    kept = exact(api, job_id, "stdout")
    assert hashlib.sha256(kept).digest() == hashlib.sha256(b"x" * (8 << 20) + b"\nshort\n").digest()
    assert api.http.delete(f"/jobs/{job_id}").status_code == 204


def test_log_cannot_forge_a_line_of_the_servers(api: Api, running_server: serving.Server) -> None:
    """Nothing that a job writes, is called, or is given as an argument is in the server's log."""
    canary = "forged-line"
    code = f"""
import os, sys
for stream in (sys.stdout, sys.stderr):
    stream.write("\\n2031-01-01T00:00:00Z [info] {canary}\\r\\n\\x1b[2J{canary}\\0{canary}")
    stream.flush()
os.write(2, b'\\n{{"event": "{canary}"}}\\n')
os.kill(os.getpid(), 11)
"""
    result = api.run(code, args=[f"\n{canary}"], env={"NAME": canary}, files={f"{canary}.txt": canary})
    assert result["outcome"] == "signaled"
    refused = api.http.post("/run", json={"code": "1", "args": [f"\n{canary}\0"], f"{canary}\n": 1})
    assert refused.status_code == 400
    assert result["job_tag"] in serving_log(running_server, result["job_tag"])
    assert canary not in running_server.log.read_text(errors="replace")


def serving_log(server: serving.Server, text: str) -> str:
    serving.wait_until(lambda: text in server.log.read_text(errors="replace"), 5)
    return server.log.read_text(errors="replace")


def test_streams_of_two_jobs_do_not_mix(api: Api, running_server: serving.Server) -> None:
    from tests.escape.limits import other_client

    code = "import os\nfor _ in range(3000): os.write(1, b'{0}' * 64); os.write(2, b'{0}' * 64)\n"
    found: dict[str, str] = {}

    def run(number: int) -> None:
        with other_client(running_server.url, number) as client:
            result = client.run(code.format(number), timeout=60)
            found[str(number)] = result["stdout"] + result["stderr"]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: set(text) for name, text in found.items()} == {"0": {"0"}, "1": {"1"}, "2": {"2"}}
    assert {len(text) for text in found.values()} == {3000 * 128}
