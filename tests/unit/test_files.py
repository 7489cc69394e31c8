"""Output appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.errors import NotFoundError, SiphonError, UsageError
from agent.files import Reading, Writing, whole


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with whole(str(path)) as out:
        out.write(b"one", memoryview(b"two"))
        out.skip(1 << 20)
        assert not path.exists()
    assert path.read_bytes() == b"onetwo" + bytes(1 << 20)
    assert path.stat().st_blocks * 512 < 1 << 20  # what was skipped is a hole
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_nothing_and_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("before")
    with pytest.raises(UsageError, match="exists"), whole(str(path)):
        pass
    with pytest.raises(ZeroDivisionError), whole(str(path), force=True) as out:
        out.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with whole(str(path), force=True) as out:
        out.write(b"after")
    assert path.read_text() == "after"


def test_a_file_that_comes_to_be_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(UsageError, match="exists"), whole(str(path)):
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


def test_a_pipe_whose_reader_has_gone_is_a_failure() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(SiphonError, match="not complete"):
        Writing(writing, "standard output", holes=False).write(b"x")
    os.close(writing)


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        Reading(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="cannot be written"), whole(str(tmp_path / "absent" / "out")):
        pass
    with pytest.raises(UsageError, match="exists"), whole(str(tmp_path), force=True):
        pass
