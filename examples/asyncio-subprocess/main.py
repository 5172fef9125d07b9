"""Starts several programs at once and reads what they print as it comes; one that takes too long is killed."""

import asyncio
import sys
import time


async def watch(name, *command):
    """Run a program, print each line with its name, and return its exit code."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async for line in process.stdout:
        print(f"{name}: {line.decode().rstrip()}", flush=True)
    return await process.wait()


async def echo(text):
    """Send text through `tr` and get it back."""
    process = await asyncio.create_subprocess_exec(
        "tr", "a-z", "A-Z", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate(text.encode())
    return output.decode()


async def main():
    started = time.monotonic()
    codes = await asyncio.gather(
        watch("shell", "sh", "-c", "for i in 1 2 3; do echo step $i; sleep 0.2; done"),
        watch("python", sys.executable, "-c", "import time; time.sleep(0.3); print(6 * 7)"),
        watch("failing", "sh", "-c", "echo about to fail; exit 3"),
    )
    print("exit codes:", codes)
    print(await echo("through a pipe and back"))
    process = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        await asyncio.wait_for(process.wait(), timeout=0.5)
    except TimeoutError:
        process.kill()
        print("sleep was killed:", await process.wait())
    print(f"all in less than 5 seconds: {time.monotonic() - started < 5}")


asyncio.run(main())
