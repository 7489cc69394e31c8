"""Reaching the other site: the only module that imports asyncssh.

The user's SSH configuration, agent and known hosts apply as with `ssh`. A host key that is not
known is refused, with the line that would pin it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import asyncssh

from agent.errors import LinkError, LockedError, NotFoundError, SiphonError, SiteError, UsageError
from agent.spec import TargetSpec

#: Unsent bytes above which writing waits, and below which it goes on.
_HIGH, _LOW = 2 << 20, 512 << 10
#: The largest packet that OpenSSH takes, bytes.
_PACKET = 32 << 10
#: How much is handed to the socket at once, bytes; more would leave the processor's cache.
_GATHERED = 256 << 10
#: After how long a lock that nobody touches is taken over, seconds.
_STALE = 600
_MSG_IGNORE = 2  # RFC 4253, 12
#: How much of the worker's diagnostics is kept to explain its end, bytes.
_WORDS = 4096
#: The cheapest cipher for asyncssh's and OpenSSH's processors alike; the rest of the defaults follow.
_CIPHERS = "^aes128-gcm@openssh.com"


@dataclass(frozen=True)
class SshSettings:
    """What overrides the user's SSH configuration; empty fields do not."""

    port: int = 0
    identity: str = ""
    known_hosts: str = ""
    config: str = ""


class Opener(Protocol):
    """Opens channels to the same command once more, over a connection of their own if `fresh`."""

    def __call__(self, count: int, *, fresh: bool) -> AbstractAsyncContextManager[tuple[SshChannel, ...]]:
        """Yield `count` channels."""


class SshChannel:
    """One SSH session that runs a worker; a `Channel` of agent/session.py."""

    def __init__(self, channel: asyncssh.SSHClientChannel[bytes], say: Callable[[str], None]) -> None:
        self.sent = 0
        self.rtt = 0.0
        self.opener: Opener | None = None
        self._channel = channel
        self._say = say
        self._received: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._gone = False
        self._words = bytearray()
        self._status: int | None = None
        self._why = ""

    def write(self, data: bytes | memoryview) -> None:
        """Send bytes, without waiting."""
        if self._gone:
            return  # reading tells why
        self.sent += len(data)
        view = memoryview(data)
        try:
            # One packet at a time: asyncssh copies each several times, which is cheap while it fits the cache.
            for at in range(0, len(view), _PACKET):
                self._channel.write(view[at : at + _PACKET])
        except (asyncssh.Error, OSError) as error:
            self.lost(str(error))

    async def drain(self) -> None:
        """Wait until more may be written."""
        await self._room.wait()

    async def emptied(self) -> None:
        """Wait until all that was written has left this side."""
        if not self._gone:
            self._channel.set_write_buffer_limits(0, 0)
            await self._room.wait()
            self._channel.set_write_buffer_limits(_HIGH, _LOW)

    async def receive(self) -> bytes:
        """Return the next bytes, b"" once the other side is gone."""
        while not self._received:
            if self._gone:
                return b""
            self._news.clear()
            await self._news.wait()
        return self._received.popleft()

    @asynccontextmanager
    async def more(self, count: int, *, fresh: bool) -> AsyncIterator[tuple[SshChannel, ...]]:
        """Open channels to further processes of the same command, over a connection of their own if `fresh`."""
        assert self.opener is not None, "this channel's command is not one to have several of"
        async with self.opener(count, fresh=fresh) as channels:
            yield channels

    def verdict(self, *, greeted: bool) -> SiphonError:
        """Tell why the other side is gone."""
        words = self._words.decode(errors="replace").strip()
        last = words.splitlines()[-1] if words else ""
        if greeted or self._status is None:
            return LinkError(f"the connection to the target site broke: {self._why or last or 'it was closed'}")
        if self._status == 127 or "not found" in last:
            return SiteError(
                f"there is no rbd-siphon at the target: {last or 'command not found'}",
                hint="install it there (see the README), name its path with --worker-command, or do without: --worker rbd",
            )
        return SiteError(
            f"the worker at the target ended at once, with status {self._status}: {last or 'it said nothing'}",
            hint="try it by hand: ssh HOST rbd-siphon worker --help",
        )

    # Called by _Client, on the event loop.

    def arrived(self, data: bytes, *, diagnostics: bool) -> None:
        """Take what the worker sent."""
        if diagnostics:
            self._words += data
            del self._words[:-_WORDS]
            for line in data.decode(errors="replace").splitlines():
                self._say(f"target: {line}")
        else:
            self._received.append(data)
            self._news.set()

    def ended(self, status: int) -> None:
        """The remote command has ended."""
        self._status = status

    def end(self) -> None:
        """Tell the command that its input ends here."""
        if not self._gone:
            self._channel.write_eof()

    @property
    def unsent(self) -> int:
        """How many bytes wait here to be sent."""
        return self._channel.get_write_buffer_size()

    @property
    def status(self) -> int | None:
        """The command's status, None while it runs and if it was ended by a signal."""
        return self._status

    @property
    def words(self) -> str:
        """The end of what the command said on standard error."""
        return self._words.decode(errors="replace").strip()

    def lost(self, why: str) -> None:
        """Nothing more comes."""
        self._gone, self._why = True, self._why or why
        self._news.set()
        self._room.set()

    def writable(self, *, free: bool) -> None:
        """There is room to write, or none."""
        if free or self._gone:
            self._room.set()
        else:
            self._room.clear()


class _Client(asyncssh.SSHClientSession[bytes]):
    """Hands asyncssh's callbacks on to the channel."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.channel: SshChannel

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        self.channel = SshChannel(chan, self._say)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self.channel.arrived(data, diagnostics=datatype == asyncssh.EXTENDED_DATA_STDERR)

    def exit_status_received(self, status: int) -> None:
        self.channel.ended(status)

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:  # noqa: ARG002, FBT001  # asyncssh's
        self.channel.lost(f"the worker was ended by signal {signal}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.channel.lost(str(exc) if exc else "")

    def pause_writing(self) -> None:
        self.channel.writable(free=False)

    def resume_writing(self) -> None:
        self.channel.writable(free=True)


class _Known(asyncssh.SSHClient):
    """Remembers a host key that is not known, for the message."""

    def __init__(self) -> None:
        self.unknown: tuple[str, int, asyncssh.SSHKey] | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:  # noqa: ARG002  # asyncssh's
        self.unknown = (host, port, key)
        return False


@asynccontextmanager
async def _connected(
    target: TargetSpec, settings: SshSettings, timeout: float, **more: Any
) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """Connect to the target's host; LinkError or SiteError if that cannot be."""
    known = _Known()
    try:
        async with asyncio.timeout(timeout):
            options = _options(target, settings, timeout) | more
            connection, _ = await asyncssh.create_connection(lambda: known, target.host, **options)
    except TimeoutError:
        raise LinkError(f"{target.host} does not answer within {timeout:.0f} s") from None
    except (asyncssh.Error, OSError, ValueError) as error:
        raise _explained(error, target, known) from error
    _spare_ignores(connection)
    _gather_packets(connection)
    try:
        yield connection
    finally:
        connection.close()
        try:
            async with asyncio.timeout(2):
                await connection.wait_closed()
        except TimeoutError:
            connection.abort()


@asynccontextmanager
async def worker_channel(
    target: TargetSpec, settings: SshSettings, command: str, timeout: float, say: Callable[[str], None]
) -> AsyncIterator[SshChannel]:
    """Connect to the target's host, start `command` there and yield the channel to it."""
    async with _connected(target, settings, timeout) as connection:

        @asynccontextmanager
        async def more(count: int, *, fresh: bool) -> AsyncIterator[tuple[SshChannel, ...]]:
            async with AsyncExitStack() as stack:
                over = connection
                if fresh:
                    # A lane has no heartbeat of its own.
                    over = await stack.enter_async_context(_connected(target, settings, timeout, **_keepalive(timeout)))
                shell = Shell(over, target.host, timeout, say)
                starting = (stack.enter_async_context(shell.start(command)) for _ in range(count))
                yield tuple(await asyncio.gather(*starting))

        async with Shell(connection, target.host, timeout, say).start(command) as channel:
            channel.opener = more
            yield channel


def _keepalive(timeout: float) -> dict[str, Any]:
    """Return asyncssh's options for a connection that is given up once the other side was silent for `timeout` seconds."""
    return {"keepalive_interval": timeout / 3, "keepalive_count_max": 3}


@dataclass(frozen=True)
class Ran:
    """How a command ended: its status (None: by a signal) and what it printed."""

    status: int | None
    out: bytes
    err: str


class Shell:
    """Commands at the target's host, each in a session of its own over one connection."""

    def __init__(self, connection: asyncssh.SSHClientConnection, host: str, timeout: float, say: Callable[[str], None]) -> None:
        self._connection = connection
        self._host = host
        self._timeout = timeout
        self._say = say

    async def run(self, command: str) -> Ran:
        """Run a command to its end; LinkError if the connection breaks meanwhile."""
        self._say(f"ssh {self._host} {command}")
        with self._explained():
            done: Any = await self._connection.run(command, stdin=asyncssh.DEVNULL, encoding=None)  # bytes, since asked so
        # asyncssh's status for the end by a signal is -1.
        status = None if done.exit_status is None or done.exit_status < 0 else done.exit_status
        return Ran(status, bytes(done.stdout), bytes(done.stderr).decode(errors="replace").strip())

    @asynccontextmanager
    async def start(self, command: str) -> AsyncIterator[SshChannel]:
        """Start a command and yield the channel to it, which is closed at the end."""
        self._say(f"ssh {self._host} {command}")
        client = _Client(self._say)
        began = asyncio.get_running_loop().time()
        with self._explained():
            async with asyncio.timeout(self._timeout):
                channel, _ = await self._connection.create_session(lambda: client, command, encoding=None)
        # A channel is opened and then given its command: there and back twice.
        client.channel.rtt = (asyncio.get_running_loop().time() - began) / 2
        channel.set_write_buffer_limits(_HIGH, _LOW)
        try:
            yield client.channel
        finally:
            channel.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise LinkError(f"{self._host} does not open a session within {self._timeout:.0f} s") from None
        except (asyncssh.Error, OSError) as error:
            raise LinkError(f"the connection to {self._host} broke: {error}") from error


@asynccontextmanager
async def shell(target: TargetSpec, settings: SshSettings, timeout: float, say: Callable[[str], None]) -> AsyncIterator[Shell]:
    """Connect to the target's host, to run commands there."""
    async with _connected(target, settings, timeout, **_keepalive(timeout)) as connection:
        yield Shell(connection, target.host, timeout, say)


class SftpFolder:
    """A folder at another host, by SFTP; a `Store` of agent/store.py."""

    def __init__(self, sftp: asyncssh.SFTPClient, root: str, place: str) -> None:
        self.place = place
        self._sftp = sftp
        self._root = root

    async def names(self, folder: str) -> list[str]:
        """Return what lies in a folder, sorted."""
        with self._explained(f"listing {folder or 'the archive'}"):
            try:
                return sorted(str(name) for name in await self._sftp.listdir(self._path(folder)) if name not in (".", ".."))
            except asyncssh.SFTPNoSuchFile:
                return []

    async def read(self, name: str, at: int = 0, count: int | None = None) -> bytes:
        """Return a file's content, or a piece of it; NotFoundError if there is none."""
        with self._explained(f"reading {name}"):
            try:
                async with self._sftp.open(self._path(name), "rb") as file:
                    data: Any = await file.read(-1 if count is None else count, at)  # bytes, since it was opened so
                    return bytes(data)
            except asyncssh.SFTPNoSuchFile:
                raise NotFoundError(f"there is no file {name} in {self.place}") from None

    async def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        path = self._path(name)
        with self._explained(f"writing {name}"):
            await self._sftp.makedirs(posixpath.dirname(path), exist_ok=True)
            async with self._sftp.open(f"{path}.partial", "wb") as file:
                await file.write(data)
                with contextlib.suppress(asyncssh.SFTPOpUnsupported):  # an extension, which OpenSSH has
                    await file.fsync()
            await self._sftp.posix_rename(f"{path}.partial", path)

    async def rename(self, name: str, new: str) -> None:
        """Give a folder another name."""
        with self._explained(f"renaming {name}"):
            await self._sftp.rename(self._path(name), self._path(new))

    @asynccontextmanager
    async def lock(self, folder: str) -> AsyncIterator[None]:
        """Keep others off a folder by a file in it that is touched while we live; an old one is taken over."""
        path = f"{self._path(folder)}/.lock"
        with self._explained(f"locking {folder}"):
            await self._sftp.makedirs(self._path(folder), exist_ok=True)
            if await self._age(path) > _STALE:
                await self._sftp.remove(path)
            try:
                async with self._sftp.open(path, asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL):
                    pass
            except asyncssh.SFTPFailure as error:
                raise LockedError(
                    f"another command is at work on {self.place}/{folder}",
                    hint=f"if none is: one that was cut off is taken over after {_STALE / 60:.0f} minutes, or remove {path}",
                ) from error
        touching = asyncio.create_task(self._touch(path))
        try:
            yield
        finally:
            touching.cancel()
            with contextlib.suppress(asyncssh.Error, OSError):
                await self._sftp.remove(path)

    async def _age(self, path: str) -> float:
        """Return how long ago a file was touched, by that host's own clock (seconds); 0 if it is not there."""
        probe = f"{path}.{os.getpid()}"
        try:
            touched = (await self._sftp.stat(path)).mtime
        except asyncssh.SFTPNoSuchFile:
            return 0.0
        async with self._sftp.open(probe, "wb"):
            pass
        now = (await self._sftp.stat(probe)).mtime
        await self._sftp.remove(probe)
        return float((now or 0) - (touched or 0))

    async def _touch(self, path: str) -> None:
        with contextlib.suppress(asyncssh.Error, OSError):  # whoever uses the connection hears of it too
            while True:
                await asyncio.sleep(_STALE / 10)
                async with self._sftp.open(path, "wb") as file:
                    await file.write(b"held")

    async def remove(self, folder: str) -> None:
        """Remove a folder and what is in it."""
        with self._explained(f"removing {folder}"), contextlib.suppress(asyncssh.SFTPNoSuchFile):
            await self._sftp.rmtree(self._path(folder))

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name) if name else self._root

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection) as error:
            raise LinkError(f"{doing} in {self.place}: the connection broke: {error.reason}") from error
        except asyncssh.SFTPError as error:
            raise SiteError(f"{doing} in {self.place}: {error.reason}") from error
        except (asyncssh.Error, OSError) as error:
            raise LinkError(f"{doing} in {self.place}: {error}") from error


@asynccontextmanager
async def sftp_folder(target: TargetSpec, root: str, settings: SshSettings, timeout: float) -> AsyncIterator[SftpFolder]:
    """Connect to a host and yield a folder there."""
    # SFTP has no heartbeat of its own.
    async with _connected(target, settings, timeout, **_keepalive(timeout)) as connection:
        try:
            async with asyncio.timeout(timeout):
                sftp = await connection.start_sftp_client()
        except (asyncssh.Error, OSError) as error:
            raise SiteError(
                f"{target.host} offers no SFTP: {error}", hint="its sshd needs: Subsystem sftp internal-sftp"
            ) from error
        async with sftp:
            yield SftpFolder(sftp, root, f"{target.host}:{root}")


def _spare_ignores(connection: asyncssh.SSHClientConnection) -> None:
    """Leave out the empty SSH_MSG_IGNORE that asyncssh sends before every packet.

    It defends CBC ciphers (RFC 4251, 9.3.1); authenticated ones need no such defence, and it is half
    of the packets: without it a first copy on loopback took 8 % less time (medians of six pairs).
    """
    cipher = str(connection.get_extra_info("send_cipher", ""))
    if "gcm" not in cipher and "chacha20-poly1305" not in cipher:
        return
    send = connection.send_packet

    def send_packet(pkttype: int, *args: bytes, handler: Any = None) -> None:
        if pkttype != _MSG_IGNORE:
            send(pkttype, *args, handler=handler)

    connection.send_packet = send_packet  # type: ignore[method-assign]  # asyncssh has no option for it


def _gather_packets(connection: asyncssh.SSHClientConnection) -> None:
    """Hand packets to the socket a few at a time: asyncssh makes a system call for each.

    Half of its thread's time on loopback was in send(2); this takes 4 % off the processor time that
    a first copy costs both sites together.
    """
    loop = asyncio.get_running_loop()
    send = connection._send  # noqa: SLF001  # asyncssh has no option for it
    waiting: list[bytes] = []
    size = 0

    def flush() -> None:
        nonlocal size
        if waiting:
            data = b"".join(waiting)
            waiting.clear()
            size = 0
            send(data)

    def gather(data: bytes) -> None:
        nonlocal size
        if not waiting:
            loop.call_soon(flush)  # at the latest before the loop waits again
        waiting.append(data)
        size += len(data)
        if size >= _GATHERED:
            flush()

    connection._send = gather  # type: ignore[method-assign]  # noqa: SLF001  # as above


def _options(target: TargetSpec, settings: SshSettings, timeout: float) -> dict[str, Any]:
    options: dict[str, Any] = {"encryption_algs": _CIPHERS, "connect_timeout": timeout, "login_timeout": timeout}
    if target.user:
        options["username"] = target.user
    if port := settings.port or target.port:
        options["port"] = port
    if settings.identity:
        options["client_keys"] = [_readable(settings.identity)]
    if settings.known_hosts:
        options["known_hosts"] = _readable(settings.known_hosts)
    if settings.config:
        options["config"] = [_readable(settings.config)]
    return options


def _readable(path: str) -> str:
    full = Path(path).expanduser()
    if not os.access(full, os.R_OK):
        raise UsageError(f"{path} cannot be read")
    return str(full)


def _explained(error: Exception, target: TargetSpec, known: _Known) -> SiphonError:
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        if known.unknown is None:
            return SiteError(f"the host key of {target.host} was refused: {error}")
        host, port, key = known.unknown
        name = host if port == 22 else f"[{host}]:{port}"
        line = key.export_public_key("openssh").decode().split()
        return SiteError(
            f"the host key of {target.host} is not known (fingerprint {key.get_fingerprint()})",
            hint=f"if that is the fingerprint of the host, pin it: echo '{name} {line[0]} {line[1]}' >> ~/.ssh/known_hosts",
        )
    if isinstance(error, asyncssh.PermissionDenied):
        return SiteError(
            f"{target.host} refused our keys: {error.reason}",
            hint="name a key with --identity, or add yours to the authorized_keys there",
        )
    if isinstance(error, asyncssh.KeyImportError | asyncssh.KeyEncryptionError | asyncssh.ConfigParseError | ValueError):
        return UsageError(f"the SSH configuration cannot be used: {error}")
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return SiteError(f"the host {target.host} is not known: {error.strerror}", hint="check the name, and ~/.ssh/config")
    if isinstance(error, asyncssh.ProtocolNotSupported | asyncssh.KeyExchangeFailed):
        return SiteError(f"{target.host} and this host have no SSH protocol in common: {error}")
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return LinkError(
        f"{target.host} cannot be reached: {reason}", hint="is its SSH server up, and the port open? try: ssh HOST true"
    )
