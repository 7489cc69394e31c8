"""The loop's configuration: TOML, read as a whole and found right, or refused with the key that is wrong. Pure.

Spans of time are written `90s`, `15m`, `6h`, `30d`; rates, packing and lanes as on the command line.
"""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from ipaddress import ip_address
from itertools import combinations
from typing import Any, Literal, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from cronsim import CronSim, CronSimError

from agent.compression import parse_method
from agent.errors import UsageError
from agent.pace import parse_limit
from agent.retention import Keep
from agent.spec import parse_place
from agent.weigh import parse_lanes

_SPAN = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TRASH = "trash-after "
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
#: Any moment will do to see whether a schedule can be read.
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class Span(float):
    """A length of time, seconds."""

    __slots__ = ()


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections; `problems` tells what is wrong beyond the types."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield keys and what is wrong with each."""
        yield from ()


class Source(Section, frozen=True):
    """The cluster here; what is left out is as for `rbd`."""

    conf: str = ""
    cluster: str = ""
    id: str = ""
    keyring: str = ""


class Target(Section, frozen=True):
    """A site to replicate to: how SSH reaches it, which cluster is there, and how data travel."""

    host: str
    user: str = ""
    port: int = 0
    identity: str = ""
    known_hosts: str = ""
    ssh_config: str = ""
    conf: str = ""
    cluster: str = ""
    id: str = ""
    keyring: str = ""
    worker: Literal["siphon", "rbd"] = "siphon"
    worker_command: str = "rbd-siphon worker"
    lanes: str | int = "auto"
    compress: str = "auto"
    checksum_skip: bool = False
    bwlimit: str = "0"
    parallel: int = 4
    timeout: Span = Span(60)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield keys and what is wrong with each."""
        if not _is_host(self.host):
            yield "host", f"{self.host!r} is no host as SSH knows it; user and port have keys of their own"
        yield from _between("port", self.port, 0, 65535)
        yield from _between("parallel", self.parallel, 1, 64)
        yield from _between("timeout", self.timeout, 1, 86400)
        for key, value, parse in (
            ("lanes", str(self.lanes), parse_lanes),
            ("compress", self.compress, parse_method),
            ("bwlimit", self.bwlimit, parse_limit),
        ):
            try:
                parse(value)
            except UsageError as error:
                yield key, f"{error}: {error.hint}"
        if self.worker == "rbd":
            for key, wrong in (
                ("lanes", str(self.lanes) not in ("auto", "1")),
                ("compress", self.compress not in ("auto", "none")),
                ("checksum_skip", self.checksum_skip),
            ):
                if wrong:
                    yield key, 'worker = "rbd" takes one uncompressed stream of all that changed'


class Hooks(Section, frozen=True):
    """Commands around the snapshot of each image: `freeze` before it, `thaw` after it whatever happened."""

    freeze: str = ""
    thaw: str = ""
    timeout: Span = Span(30)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield keys and what is wrong with each."""
        if self.freeze and not self.thaw:
            yield "thaw", "what freezes must be thawed: name a command"
        yield from _between("timeout", self.timeout, 1, 600)


class Job(Section, frozen=True):
    """Images of a pool (or of a namespace in it), where they go, how often, and how old a replica may be."""

    name: str
    source: str
    target: str
    objective: Span
    pool: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    metadata: dict[str, str] = {}
    every: Span | None = None
    cron: str = ""
    timezone: str = "UTC"
    jitter: Span = Span(0)
    keep: Keep = Keep()
    keep_target: Keep | None = None
    skip_unchanged: bool = True
    intermediate: bool = False
    data_pool: str = ""
    max_source_snapshots: int = 32
    on_deleted: str = "keep"
    hooks: Hooks = Hooks()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield keys and what is wrong with each."""
        if not _NAME.fullmatch(self.name):
            yield "name", f"{self.name!r} is no name: letters, digits, '.', '_' and '-'"
        for key, place in (("source", self.source), ("pool", self.pool)):
            if (place or key == "source") and parse_place(place) is None:
                yield key, f"{place!r} is neither POOL nor POOL/NAMESPACE"
        yield from self._timing()
        for key, keep in (("keep", self.keep), ("keep_target", self.keep_target)):
            if keep is not None and (keep.last < 1 or min(msgspec.structs.astuple(keep)) < 0):
                yield key, "`last` is at least 1, and nothing is negative"
        yield from _between("max_source_snapshots", self.max_source_snapshots, 2, 510)
        if self.on_deleted != "keep" and self.trash_after is None:
            yield "on_deleted", f'{self.on_deleted!r} is neither "keep" nor "trash-after 30d"'

    def _timing(self) -> Iterator[tuple[str, str]]:
        if (self.every is None) == (not self.cron):
            yield "every", 'a job runs by one of the two: every = "15m", or cron = "0 2 * * *"'
        if self.every is not None:
            yield from _between("every", self.every, 1, 366 * 86400)
            if self.objective < self.every:
                yield "objective", "it is shorter than `every`: no replica could be kept within it"
            if self.jitter >= self.every:
                yield "jitter", "it must be shorter than `every`"
        if self.cron:
            try:
                CronSim(self.cron, _EPOCH)
            except CronSimError as error:
                yield "cron", f"{self.cron!r} is no schedule ({error}): minute hour day month weekday, as in cron(5)"
        try:
            _ = self.timezone == "UTC" or ZoneInfo(self.timezone)  # the system may have no list of zones
        except (ZoneInfoNotFoundError, ValueError, OSError):
            yield "timezone", f"{self.timezone!r} is no time zone of this system: Europe/Berlin, UTC"

    @property
    def place(self) -> tuple[str, str]:
        """The pool at the source and the namespace in it."""
        return parse_place(self.source) or ("", "")

    @property
    def destination(self) -> tuple[str, str]:
        """The pool at the target and the namespace in it."""
        return parse_place(self.pool or self.source) or ("", "")

    @property
    def trash_after(self) -> float | None:
        """After how long (seconds) the replica of a deleted image goes to the trash, None for never."""
        span = self.on_deleted.removeprefix(_TRASH)
        return _seconds(span) if self.on_deleted.startswith(_TRASH) else None


class Notify(Section, frozen=True):
    """Who hears of an objective missed, a quarantine, a recovery; `heartbeat` is asked for after each cycle that went well."""

    command: str = ""
    webhook: str = ""
    heartbeat: str = ""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield keys and what is wrong with each."""
        for key, url in (("webhook", self.webhook), ("heartbeat", self.heartbeat)):
            if url and not url.startswith(("http://", "https://")):
                yield key, f"{url!r} is no address: https://…"


class Agent(Section, frozen=True):
    """The process itself: where it listens, how it logs, how long it holds an image and how long stopping may take."""

    name: str = ""
    socket: str = "/run/rbd-siphon/agent.sock"
    listen: str = ""
    token_file: str = ""
    log_format: Literal["auto", "text", "json"] = "auto"
    lease: Span = Span(30)
    stop_timeout: Span = Span(30)
    notify: Notify = Notify()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield keys and what is wrong with each."""
        yield from _between("lease", self.lease, 5, 600)
        yield from _between("stop_timeout", self.stop_timeout, 1, 600)
        host, colon, port = self.listen.rpartition(":")
        if self.listen and not (colon and port.isdecimal() and 0 < int(port) < 1 << 16):
            yield "listen", f"{self.listen!r} is no address and port: 127.0.0.1:9280"
        elif self.listen and host not in _LOOPBACK and not self.token_file:
            yield "token_file", f"{self.listen} can be reached from elsewhere, so it needs a token"


class Config(Section, frozen=True):
    """All of a configuration file."""

    target: dict[str, Target]
    job: tuple[Job, ...]
    source: Source = Source()
    agent: Agent = Agent()


class _Document(Section, frozen=True):
    """The file's sections, each still as TOML gives it."""

    source: dict[str, Any] = {}
    target: dict[str, dict[str, Any]] = {}
    job: tuple[dict[str, Any], ...] = ()
    agent: dict[str, Any] = {}


S = TypeVar("S", bound=Section)


def parse_config(text: str, name: str) -> Config:
    """Read a configuration; UsageError that names the file (`name`), the key, and what is allowed there."""
    try:
        document = _section(tomllib.loads(text), _Document, "")
        config = Config(
            source=_section(document.source, Source, "source"),
            target={each: _section(table, Target, f"target.{each}") for each, table in document.target.items()},
            job=tuple(_section(table, Job, _job_path(number, table)) for number, table in enumerate(document.job, 1)),
            agent=_section(document.agent, Agent, "agent"),
        )
        _refuse(_contradictions(config), "")
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is no TOML: {error}") from error
    except UsageError as error:
        raise UsageError(f"{name}: {error}", hint=f"try again with: rbd-siphon config check {name}") from error
    return config


def shown(config: Config) -> dict[str, Any]:
    """Return all that is in force, defaults included, as JSON would have it; spans are seconds."""
    built: dict[str, Any] = msgspec.to_builtins(config, enc_hook=float)
    return built


def _job_path(number: int, table: Mapping[str, Any]) -> str:
    name = table.get("name")
    return f'job "{name}"' if isinstance(name, str) and name else f"job {number}"


def _section(table: Mapping[str, Any], kind: type[S], path: str) -> S:
    """Return a section of the file; UsageError naming the key below `path` that is wrong."""
    _refuse_unknown(table, kind, path)
    try:
        section = msgspec.convert(table, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        raise UsageError(f"{_joined(path, where.rstrip('`').lstrip('.'))}: {message}") from error
    for below, each in _sections(section, path):
        _refuse(each.problems(), below)
    return section


def _refuse(problems: Iterator[tuple[str, str]], path: str) -> None:
    for key, message in problems:
        raise UsageError(f"{_joined(path, key)}: {message}")


def _sections(section: Section, path: str) -> Iterator[tuple[str, Section]]:
    yield path, section
    for key in section.__struct_fields__:
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from _sections(value, _joined(path, key))


def _refuse_unknown(table: Mapping[str, Any], kind: type[msgspec.Struct], path: str) -> None:
    hints = typing.get_type_hints(kind)
    for key, value in table.items():
        if key not in kind.__struct_fields__:
            raise UsageError(f"{_joined(path, key)} is not known; known here: {', '.join(kind.__struct_fields__)}")
        for each in (hints[key], *typing.get_args(hints[key])):
            if isinstance(value, dict) and isinstance(each, type) and issubclass(each, msgspec.Struct):
                _refuse_unknown(value, each, _joined(path, key))


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


def _decode(kind: type[Any], value: object) -> object:
    seconds = _seconds(value) if kind is Span and isinstance(value, str) else None
    if seconds is None:
        raise ValueError(f"{value!r} is no length of time: a number and s, m, h or d, as in 90s, 15m, 6h, 30d")
    return Span(seconds)


def _is_host(text: str) -> bool:
    try:
        return ip_address(text.removeprefix("[").removesuffix("]")).version > 0
    except ValueError:
        return bool(text) and not text.startswith("-") and not set(text) & set("@:/[] ")


def _seconds(text: str) -> float | None:
    match = _SPAN.fullmatch(text)
    return float(match[1]) * _SECONDS[match[2]] if match else None


def _between(key: str, value: float, least: float, most: float) -> Iterator[tuple[str, str]]:
    if not least <= value <= most:
        yield key, f"{value:g} is not between {least:g} and {most:g}"


def _contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Yield where sections do not fit together."""
    if not config.job:
        yield "job", "there is none: nothing would be replicated"
    for job in config.job:
        if job.target not in config.target:
            there = ", ".join(config.target) or "none"
            yield f'job "{job.name}".target', f"there is no target {job.target!r}; there are: {there}"
    for one, two in combinations(config.job, 2):
        if one.name == two.name:
            yield f'job "{one.name}".name', "two jobs have this name"
        if one.source != two.source and (one.target, one.pool or one.source) == (two.target, two.pool or two.source):
            yield (
                f'job "{two.name}".pool',
                f'job "{one.name}" puts images of another pool into the same one: those of one name would collide',
            )


EXAMPLE = """\
# rbd-siphon: what `rbd-siphon run` replicates, and how far a replica may be behind.
# Spans of time: 90s, 15m, 6h, 30d. Rates: bytes a second with K, M or G (powers of 1024).
# Try it with: rbd-siphon config check FILE

[source]                    # the cluster here; what is left out is as for `rbd`
# conf = "/etc/ceph/ceph.conf"
id = "siphon"

[target.dr]                 # a site; there may be several
host = "dr-site"            # as in ~/.ssh/config, or a host's name
user = "root"
id = "siphon"               # the Ceph user there
# worker = "siphon"         # or "rbd": nothing but Ceph's own tools at the target
# bwlimit = "08:00-18:00 50M, else 0"
# lanes = "auto"
# compress = "auto"
# parallel = 4              # how many images send at a time

[[job]]
name = "vms"
source = "vms"              # POOL or POOL/NAMESPACE
target = "dr"
pool = "vms-dr"             # there; left out: as here
# include = ["web-*"]       # globs on image names; left out: all
exclude = ["scratch-*"]
# metadata = { "siphon.enabled" = "true" }   # only images that bear this
every = "15m"               # or by the clock: cron = "0 2 * * *", timezone = "Europe/Berlin"
jitter = "30s"
objective = "30m"           # older than this, a replica is behind
keep = { last = 3, hourly = 24, daily = 7 }
# keep_target = { last = 3, daily = 30, monthly = 12 }
# skip_unchanged = true     # no snapshot where nothing was written
# max_source_snapshots = 32
# on_deleted = "keep"       # or "trash-after 30d": what becomes of the replica of an image that is gone here
# hooks = { freeze = "/usr/local/bin/freeze", thaw = "/usr/local/bin/thaw", timeout = "30s" }

[agent]
# socket = "/run/rbd-siphon/agent.sock"
# listen = "127.0.0.1:9280" # metrics and the page; elsewhere than on loopback with token_file = "…"
# lease = "30s"
# stop_timeout = "30s"
# notify = { command = "", webhook = "", heartbeat = "" }
"""
