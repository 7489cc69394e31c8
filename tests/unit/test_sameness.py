"""Comparing blocks before they are sent goes on only while it pays."""

from __future__ import annotations

from agent.sameness import NAME, Thrift, each_name, names

MIB = 1 << 20


def asked(thrift: Thrift, times: int = 160) -> int:
    """Return how many of so many batches would be compared."""
    return sum(thrift.worth() for _ in range(times))


def test_names_tell_contents_apart_and_can_be_taken_apart() -> None:
    one, two, again = each_name(names([b"a" * 5000, b"b" * 5000, memoryview(b"a" * 5000)]))
    assert one == again != two
    assert {len(each) for each in (one, two)} == {NAME}


def test_while_little_is_known_everything_is_compared() -> None:
    thrift = Thrift()
    thrift.compared(15 * MIB, 0, 100.0)
    assert asked(thrift) == 160


def test_where_hardly_anything_is_equal_one_batch_of_sixteen_is_compared() -> None:
    thrift = Thrift()
    thrift.compared(20 * MIB, 8192, 0.0)
    assert asked(thrift) == 10


def test_on_a_thin_link_comparing_goes_on_and_on_a_fast_one_it_stops() -> None:
    for rate, expected in ((MIB, 160), (1000 * MIB, 10)):
        thrift = Thrift()
        thrift.sent(10 * MIB, 10 * MIB / rate)
        thrift.compared(20 * MIB, 10 * MIB, waited=0.2)
        assert asked(thrift) == expected, rate


def test_what_was_long_ago_counts_less() -> None:
    thrift = Thrift()
    thrift.compared(20 * MIB, 0, 0.0)
    assert asked(thrift) == 10
    for _ in range(4):
        thrift.compared(2 * MIB, 2 * MIB, 0.0)
    assert asked(thrift) == 160


def test_nothing_sent_yet_means_that_comparing_is_not_too_dear() -> None:
    thrift = Thrift()
    thrift.compared(20 * MIB, 20 * MIB, 5.0)
    assert asked(thrift) == 160
