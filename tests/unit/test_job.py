"""A job's id is its only credential, and its tag what may be told instead."""

from __future__ import annotations

import random
import re

import pytest

from sandrun.jobs.clients import Client
from sandrun.jobs.job import Input, Job, job_tag
from sandrun.jobs.store import Account, Ledger
from sandrun.model import Manifest


async def make() -> Job:
    client = Client("192.0.2.7", 1)
    ledger = Ledger(1 << 20, 1 << 20, lambda _: False)
    manifest = Manifest(entrypoint="main.py", interpreter="python3")
    return Job(client, manifest, Input(), Account(ledger, client), ())


@pytest.mark.requirement(30)
async def test_id_has_128_bits_that_nobody_can_seed() -> None:
    found = set()
    for _ in range(200):
        random.seed(1)  # as a library might
        found.add((await make()).id)
    assert len(found) == 200
    assert all(re.fullmatch("[0-9a-f]{32}", job_id) for job_id in found)
    bits = [int(job_id, 16).bit_count() for job_id in found]
    assert 60 < sum(bits) / len(bits) < 68


@pytest.mark.requirement(30)
async def test_tag_does_not_tell_the_id() -> None:
    job = await make()
    assert job.tag == job_tag(job.id)
    assert re.fullmatch("[0-9a-f]{12}", job.tag)
    assert not any(job.id[at : at + 6] in job.tag for at in range(27))


@pytest.mark.requirement(15)
async def test_erased_job_holds_nothing_of_its_client() -> None:
    job = await make()
    job.manifest = Manifest(entrypoint="canary.py", interpreter="python3", args=("canary",), env={"A": "canary"})
    job.stdout.append(b"canary")
    job.stderr.append(b"canary")
    job.isolation = b'{"inside":"canary"}'
    assert job.account.held == 12
    job.erase()
    assert job.account.held == 0
    assert (job.stdout.read(), job.stderr.read(), job.inputs, job.outputs) == (b"", b"", (), {})
    assert "canary" not in str(job.manifest)
    assert job.isolation == b""
