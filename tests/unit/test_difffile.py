"""Reading a diff from a file: only its end record is an end, wherever chunks happen to be cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.diff import Data, Encoder, Event, FormatError
from agent.difffile import DiffFile, for_merging
from agent.errors import UsageError
from agent.files import CHUNK, Reading

V1 = Encoder()
HEAD = V1.banner + V1.from_snapshot("a") + V1.to_snapshot("b") + V1.size(1 << 30)


@contextmanager
def opened(folder: Path, stream: bytes) -> Iterator[Reading]:
    path = folder / "diff"
    path.write_bytes(stream)
    with Reading(str(path)).open() as source:
        yield source


def everything(source: Reading) -> list[Event]:
    return list(DiffFile(source).events())


@pytest.mark.parametrize("before", [1, 9, 16])
def test_a_cut_within_a_records_head_at_a_chunks_beginning_is_no_end(tmp_path: Path, before: int) -> None:
    # Chunks end at 4 KiB and every CHUNK behind it: the cut leaves a last chunk that completes nothing.
    fill = 4096 + CHUNK - len(HEAD) - 17
    stream = HEAD + V1.data_header(0, fill) + b"x" * fill + V1.data_header(1 << 29, 9)[:before]
    with opened(tmp_path, stream) as source, pytest.raises(FormatError, match="truncated"):
        everything(source)
    with opened(tmp_path, stream) as source, pytest.raises(FormatError, match="truncated"):
        for_merging(source)


def test_an_unknown_record_longer_than_a_chunk_hides_nothing(tmp_path: Path) -> None:
    v2 = Encoder(2)
    unknown = b"?" + (3 * CHUNK).to_bytes(8, "little") + bytes(3 * CHUNK)
    stream = v2.banner + v2.size(99) + unknown + v2.data_header(5, 3) + b"abc" + v2.end
    with opened(tmp_path, stream) as source:
        assert Data(5, b"abc") in everything(source)


@pytest.mark.parametrize("late", [V1.from_snapshot("x"), V1.to_snapshot("x"), V1.size(5)])
def test_names_and_sizes_behind_the_header_are_refused(tmp_path: Path, late: bytes) -> None:
    with opened(tmp_path, V1.banner + V1.size(99) + late + V1.end) as source, pytest.raises(FormatError, match="behind its header"):
        everything(source)


def test_records_before_a_size_and_sizes_that_no_image_has_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path, V1.banner + V1.zero(0, 5) + V1.end) as source, pytest.raises(FormatError, match="names no size"):
        DiffFile(source)
    with opened(tmp_path, V1.banner + V1.size((1 << 64) - 1) + V1.end) as source, pytest.raises(FormatError, match="bytes"):
        DiffFile(source)


def test_many_empty_records_are_passed_over(tmp_path: Path) -> None:
    stream = HEAD + V1.zero(70, 0) * 5000 + V1.zero(7, 3) + V1.end
    with opened(tmp_path, stream) as source:
        merging = for_merging(source)
        span = merging.next()
        assert span is not None
        assert (span.offset, span.end) == (7, 10)
        assert merging.next() is None


def test_a_folder_is_no_diff(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        Reading(str(tmp_path))
