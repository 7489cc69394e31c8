"""Frames: whatever is sent arrives the same in pieces of any size, and damage is found."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import messages as m
from agent.compression import unpacked
from agent.errors import DataError, SiteError
from agent.model import Checkpoint, ImageIdentity, ImageSpec, Snapshot, Step
from agent.wire import MAX_NOISE, MAX_PAYLOAD, PROTOCOL, Frame, Kind, Receiver, checksum, control, greeting, header


def data(offset: int, payload: bytes, tag: int = 3, segment: int = 1) -> bytes:
    signed = checksum(Kind.DATA, tag, segment, offset, len(payload), payload)
    return header(Kind.DATA, tag, segment, offset, len(payload), signed) + payload


def zeros(offset: int, length: int) -> bytes:
    return header(Kind.ZERO, 3, 1, offset, length, checksum(Kind.ZERO, 3, 1, offset, length, b""), size=0)


def greeted() -> Receiver:
    receiver = Receiver()
    assert receiver.feed(greeting("1.2.3")) == []
    return receiver


@given(st.lists(st.tuples(st.integers(0, 2**63), st.binary(min_size=1, max_size=300)), max_size=5), st.integers(1, 50))
def test_frames_arrive_whole_in_pieces_of_any_size(frames: list[tuple[int, bytes]], step: int) -> None:
    stream = b"".join(data(offset, payload) + zeros(offset, 5) + control(9, payload) for offset, payload in frames)
    receiver = greeted()
    found: list[Frame] = []
    for at in range(0, len(stream), step):
        found += receiver.feed(stream[at : at + step])
    assert [(each.kind, each.offset, each.payload) for each in found] == [
        item
        for offset, payload in frames
        for item in ((Kind.DATA, offset, payload), (Kind.ZERO, offset, b""), (Kind.CONTROL, 0, payload))
    ]
    assert not receiver.partial


@given(st.integers(0, 47 + 100), st.integers(0, 7))
def test_every_flipped_bit_is_found(at: int, bit: int) -> None:
    stream = bytearray(data(4096, bytes(range(100))))
    stream[at] ^= 1 << bit
    receiver = greeted()
    with pytest.raises(DataError):
        for frame in receiver.feed(bytes(stream) + data(0, b"x" * 200) * 3):
            assert unpacked(frame) != bytes(range(100)), "a damaged frame passed"
        raise DataError("incomplete") if receiver.partial else AssertionError("nothing was noticed")


@given(st.binary(max_size=400))
def test_garbage_raises_our_own_error_or_waits(garbage: bytes) -> None:
    receiver = greeted()
    try:
        receiver.feed(garbage)
    except DataError:
        return
    assert receiver.partial or not garbage


def test_no_length_allocates_more_than_the_limit() -> None:
    lying = bytearray(header(Kind.CONTROL, 1, 0, 0, 0, 0))
    lying[4:8] = (MAX_PAYLOAD + 1).to_bytes(4, "little")
    with pytest.raises(DataError, match="not a frame"):
        greeted().feed(bytes(lying))


def test_the_greeting_tells_protocol_and_version() -> None:
    receiver = Receiver()
    receiver.feed(greeting("9.8")[:10])
    assert not receiver.greeted
    assert [each.payload for each in receiver.feed(greeting("9.8")[10:] + control(1, b"hi"))] == [b"hi"]
    assert (receiver.peer_protocol, receiver.peer_version) == (PROTOCOL, "9.8")


def test_noise_before_the_greeting_is_skipped_and_kept_for_the_report() -> None:
    receiver = Receiver()
    receiver.feed(b"Welcome to dr-site!\nLast login: never\n" + greeting("1"))
    assert receiver.greeted
    assert receiver.noise == b"Welcome to dr-site!\nLast login: never"


def test_noise_without_end_is_refused() -> None:
    receiver = Receiver()
    with pytest.raises(SiteError, match="does not speak our protocol"):
        for _ in range(MAX_NOISE // 1000 + 2):
            receiver.feed(b"y" * 1000)


def test_the_digest_of_a_step_does_not_depend_on_the_order() -> None:
    sums = [checksum(Kind.DATA, 1, 0, offset, 3, b"abc") for offset in (0, 4096, 8192)]
    assert len(set(sums)) == 3
    assert checksum(Kind.ZERO, 1, 0, 0, 3, b"") not in sums


@pytest.mark.parametrize(
    "message",
    [
        m.Heartbeat(),
        m.Begin(step=Step(Snapshot(1, "a", 5), Snapshot(2, "b", 6))),
        m.Begin(step=Step(None, Snapshot(2, "ü/@", 6)), discard=True),
        m.Durable(Checkpoint(5, 1, 2, "f" * 32)),
        m.Open(image=ImageSpec("p", "i", "n"), source=ImageIdentity("f", "i")),
        m.Failure("SiteError", "no", "try"),
    ],
)
def test_messages_survive_the_wire(message: m.Message) -> None:
    assert m.unpack(m.pack(message)) == message


@given(st.binary(max_size=100))
def test_bytes_that_are_no_message_raise_our_own_error(garbage: bytes) -> None:
    with contextlib.suppress(DataError):
        m.unpack(garbage)


def test_a_later_versions_fields_are_ignored() -> None:
    import msgspec

    assert m.unpack(msgspec.msgpack.encode({"type": "Done", "news": 1})) == m.Done()
