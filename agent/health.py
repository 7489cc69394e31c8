"""What a cluster says of itself, read from the JSON that its monitors answer with. Pure."""

from __future__ import annotations

import msgspec

from agent.errors import SiteError

#: Health checks that mean writes will not get through.
_TROUBLE = ("OSD_FULL", "POOL_FULL", "OSD_BACKFILLFULL", "OSD_DOWN", "MON_DISK_CRIT")


class _Summary(msgspec.Struct):
    message: str


class _Check(msgspec.Struct):
    summary: _Summary


class _Health(msgspec.Struct):
    checks: dict[str, _Check]


class _Pool(msgspec.Struct):
    pool_name: str
    flags_names: str = ""


class _Map(msgspec.Struct):
    fsid: str
    pools: list[_Pool]


def trouble(health: str | bytes) -> tuple[str, ...]:
    """Return what the answer to `health` says that keeps writes from getting through; nothing if it cannot be read."""
    try:
        checks = msgspec.json.decode(health, type=_Health).checks
    except msgspec.MsgspecError:
        return ()  # only told to make another error's message better
    return tuple(checks[name].summary.message for name in _TROUBLE if name in checks)


def is_full(osd_dump: str | bytes, pool: str) -> bool:
    """Tell whether the answer to `osd dump` flags `pool` as full; False if it cannot be read."""
    try:
        pools = msgspec.json.decode(osd_dump, type=_Map).pools
    except msgspec.MsgspecError:
        return False  # the operations' own limit will tell
    flags = next((each.flags_names for each in pools if each.pool_name == pool), "")
    return not {"full", "full_quota"}.isdisjoint(flags.split(","))


def fsid(osd_dump: str | bytes) -> str:
    """Return the cluster's id from the answer to `osd dump`; SiteError if it cannot be read."""
    try:
        return msgspec.json.decode(osd_dump, type=_Map).fsid
    except msgspec.MsgspecError as error:
        raise SiteError(f"what `ceph osd dump` answers cannot be read: {error}") from error
