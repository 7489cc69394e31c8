"""What a transfer changes as it goes: harder packing where the link is short, more lanes where windows are."""

from __future__ import annotations

from agent.compression import RAW, Method
from agent.weigh import LADDER, MOST_LANES, WINDOW, Growth, Look, Weigher
from agent.wire import Codec


def after(weigher: Weigher, look: Look, times: int = 20) -> Method:
    for _ in range(times):
        weigher.look(look)
    return weigher.method


def test_a_near_fast_link_is_not_packed_for() -> None:
    assert after(Weigher(None), Look(blocked=0.9, idle=0.05, rate=300e6)) == RAW
    assert after(Weigher(None), Look(blocked=0.0, idle=0.5, rate=300e6)) == RAW


def test_a_thin_link_gets_the_strongest_packing_that_leaves_the_processors_idle() -> None:
    weigher = Weigher(None)
    assert after(weigher, Look(blocked=1.0, idle=0.6, rate=10e6)) == LADDER[-1]
    assert after(weigher, Look(blocked=0.0, idle=0.1, rate=10e6), 1) == LADDER[-2]


def test_one_look_moves_one_rung() -> None:
    weigher = Weigher(None)
    assert [after(weigher, Look(1.0, 1.0, 1e6), 1) for _ in LADDER[1:]] == list(LADDER[1:])


def test_a_far_site_is_packed_for_from_the_first_block_and_always() -> None:
    weigher = Weigher(None)
    weigher.far(0.1)
    assert weigher.method == Method(Codec.ZSTD, 1)
    assert after(weigher, Look(blocked=0.0, idle=0.0, rate=100e6)) == Method(Codec.ZSTD, 1)


def test_what_the_user_fixed_stays() -> None:
    weigher = Weigher(Method(Codec.LZ4))
    weigher.far(0.1)
    assert after(weigher, Look(1.0, 1.0, 1e6)) == Method(Codec.LZ4)
    assert Growth(3).first(0.1) == Growth(3).look(Look(1.0, 1.0, 1e9), 3, 1.0) == 3


def test_lanes_are_as_many_as_the_distance_asks_for() -> None:
    assert [Growth(None).first(rtt) for rtt in (0.0, 0.001, 0.012, 0.02, 0.05, 0.1, 1.0)] == [1, 1, 1, 1, 3, 6, 8]


def test_lanes_grow_while_the_rate_grows_and_windows_bound_it() -> None:
    growth, lanes, rtt = Growth(None), 8, 0.1
    full = WINDOW / rtt
    counts = []
    for rate in (8 * full, 10 * full, 10 * full, 20 * full):
        lanes = growth.look(Look(1.0, 0.5, rate), lanes, rtt)
        counts.append(lanes)
    assert counts == [10, 12, 12, 14]
    assert growth.look(Look(1.0, 0.5, 100 * full), MOST_LANES, rtt) == MOST_LANES
    assert Growth(None).look(Look(1.0, 0.5, full), 8, rtt) == 8, "windows are not what bounds it"
    assert Growth(None).look(Look(0.1, 0.5, 8 * full), 8, rtt) == 8, "the link is not what is waited for"
