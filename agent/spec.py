"""Reading what a person types: image specs as `rbd` reads them, and targets on another host. Pure."""

from __future__ import annotations

import re

from agent.errors import UsageError
from agent.model import ImageSpec, Value

DEFAULT_POOL = "rbd"  # as in rbd: rbd_default_pool
_TARGET = re.compile(
    r"(?:(?P<user>[^@/:]+)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\[\]@/:]+)(?::(?P<port>\d+)(?=:))?:(?P<place>.*)", re.DOTALL
)


class SourceSpec(Value, frozen=True):
    """An image, and the snapshot to send (empty: take one now)."""

    image: ImageSpec
    snapshot: str = ""


class TargetSpec(Value, frozen=True):
    """A host as SSH knows it (`user` and `port` empty: left to the SSH configuration), and the replica's place."""

    host: str
    image: ImageSpec
    user: str = ""
    port: int = 0

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        return f"{user}{self.host}{port}:{self.image}"


def parse_source(text: str) -> SourceSpec:
    """Read `[pool/[namespace/]]image[@snapshot]`; UsageError if it is not one."""
    place, at, snapshot = text.partition("@")
    if at and not snapshot:
        raise UsageError(f"{text!r} ends in '@' without a snapshot's name", hint="leave the '@' out to take a snapshot now")
    if "@" in snapshot or "/" in snapshot:
        raise UsageError(f"{snapshot!r} is not a snapshot's name", hint="write pool/image@snapshot")
    if place.endswith("/"):
        raise UsageError(f"{text!r} names a pool or a namespace, not an image", hint="write pool/image")
    parts = place.split("/")
    if not all(parts) or len(parts) > 3:
        raise UsageError(f"{text!r} is not an image", hint="write pool/image or pool/namespace/image")
    return SourceSpec(_image([DEFAULT_POOL, *parts] if len(parts) == 1 else parts), snapshot)


def parse_pool(text: str) -> tuple[str, str] | None:
    """Read `pool/` or `pool/namespace/` as (pool, namespace); None for what names an image, UsageError for too many parts."""
    if not text.endswith("/"):
        return None
    parts = text.removesuffix("/").split("/")
    if not all(parts) or len(parts) > 2 or "@" in text:
        raise UsageError(f"{text!r} is neither a pool nor a namespace", hint="write pool/ or pool/namespace/")
    return parts[0], parts[1] if len(parts) == 2 else ""


def parse_place(text: str) -> tuple[str, str] | None:
    """Read `pool` or `pool/namespace` as (pool, namespace); None if it is neither."""
    pool, slash, namespace = text.partition("/")
    good = pool and bool(namespace) == bool(slash) and not set("/@") & set(namespace) and "@" not in pool
    return (pool, namespace) if good else None


def parse_target(text: str, source: ImageSpec) -> TargetSpec:
    """Read `[user@]host[:port]:[pool[/namespace][/image]]`; what is left out is as in `source`.

    Two parts are pool/image and three are pool/namespace/image; a trailing slash says that the
    last part is a pool or a namespace. UsageError if it is no target.
    """
    match = _TARGET.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{text!r} is not a target",
            hint="write [USER@]HOST[:PORT]:POOL[/NAMESPACE][/IMAGE], for example root@dr-site:vms-dr/web-1",
        )
    host = match["host"].strip("[]")
    port = int(match["port"] or 0)
    if host.startswith("-") or not 0 <= port < 1 << 16:
        raise UsageError(f"{text!r} does not name a host and a port", hint="write [USER@]HOST[:PORT]:POOL[/IMAGE]")
    return TargetSpec(host, _place(match["place"], text, source), match["user"] or "", port)


class StoreSpec(Value, frozen=True):
    """Where an archive lies: a folder here, or at a host."""

    folder: str
    host: TargetSpec | None = None


def parse_store(text: str) -> StoreSpec:
    """Read a folder, or `[user@]host[:port]:folder`; as with scp, a colon before any slash makes it a host's."""
    if not text:
        raise UsageError("an archive needs a folder")
    if ":" not in text.partition("/")[0]:
        return StoreSpec(text)
    match = _TARGET.fullmatch(text)
    if match is None or not match["place"] or int(match["port"] or 0) >= 1 << 16:
        raise UsageError(f"{text!r} is no place for an archive", hint="write FOLDER or [USER@]HOST[:PORT]:FOLDER")
    host = TargetSpec(match["host"].strip("[]"), ImageSpec("", ""), match["user"] or "", int(match["port"] or 0))
    return StoreSpec(match["place"], host)


def _place(place: str, text: str, source: ImageSpec) -> ImageSpec:
    if not place:
        return source
    if "@" in place:
        raise UsageError(
            f"{text!r} names a snapshot on the target", hint="a snapshot is named at the source only: pool/image@snapshot"
        )
    opened = place.endswith("/")
    parts = place.removesuffix("/").split("/")
    if not all(parts) or len(parts) > 3 - opened:
        raise UsageError(
            f"{place!r} is not a place for an image", hint="write pool, pool/image, pool/namespace/ or pool/namespace/image"
        )
    if opened or len(parts) == 1:
        parts.append(source.image)
    return _image(parts)


def _image(parts: list[str]) -> ImageSpec:
    return ImageSpec(pool=parts[0], image=parts[-1], namespace=parts[1] if len(parts) == 3 else "")
