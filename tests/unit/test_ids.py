"""Which host ids a server takes: its own block, and one a zygote, out of what its own map has."""

import os

import pytest

from sandrun.errors import SetupError
from sandrun.linux import ids
from sandrun.linux.ids import BLOCK, choose_base
from sandrun.spawner.walls import Walls

HOST = "         0          0 4294967295\n"


def test_the_wanted_ids_are_taken_where_root_has_them():
    assert choose_base(1879048192, 3, uid_map=HOST) == 1879048192


def test_root_of_a_part_of_the_ids_takes_the_second_block_of_its_largest_part():
    assert choose_base(1879048192, 2, uid_map="0 100000 1\n1000 200000 400000\n") == 1000 + BLOCK


def test_too_few_ids_are_an_error_that_says_how_many_are_needed():
    with pytest.raises(SetupError, match="root here has 65536 ids; 131072 are needed"):
        choose_base(1879048192, 1, uid_map="0 100000 65536\n")


def test_two_servers_of_one_host_have_no_id_in_common(monkeypatch, tmp_path):
    """Requirement 2 across servers: no other running sandbox has the same host uid."""
    monkeypatch.setattr(ids, "CLAIMS", str(tmp_path / "claims"))
    first, held = ids.claim(1879048192)
    second, other = ids.claim(1879048192)
    assert (first, second) == (1879048192, 1879048192 + ids.STRIDE)
    os.close(held)
    assert ids.claim(1879048192)[0] == first
    os.close(other)
    assert 1879048192 + ids.SERVERS * ids.STRIDE <= 1 << 31


def test_ids_are_mapped_that_one_line_has():
    text = "0 100000 1000\n1000 200000 1000\n"
    assert ids.are_mapped(1000, 1000, uid_map=text)
    assert not ids.are_mapped(999, 2, uid_map=text)
    assert not ids.are_mapped(1001, 1000, uid_map=text)


def test_environment_beyond_the_servers_own_ids_is_refused(monkeypatch):
    """The ids behind a server's stride are another server's."""
    monkeypatch.setattr(ids, "are_mapped", lambda first, count: True)
    walls = Walls.__new__(Walls)
    walls.uid_base = 1879048192 + BLOCK
    assert walls.block(62) == 1879048192 + ids.STRIDE - BLOCK
    with pytest.raises(SetupError, match="no ids are left for environment 63"):
        walls.block(63)
