"""Ceph as the rest of the project sees it: the only module that imports rados and rbd.

`Cluster`, `Pool` and `Image` block; callers run them in threads. `Image.read`, `write`,
`write_zeroes` and `flush` are librbd's AIO as awaitables: each completion crosses once from
librbd's thread to the event loop. Every error that Ceph reports leaves as one of agent/errors.py.

Caching is off, so a completed write is durable on the target's OSDs; and every RADOS operation has
a limit, so that a cluster that stopped answering is an error and not a hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import rados
import rbd

from agent.errnos import error_from
from agent.errors import ConflictError, LinkError, NotFoundError, SiphonError, SiteError, UsageError
from agent.extents import Extents
from agent.health import is_full, trouble
from agent.model import ImageSpec, Shape, Snapshot
from agent.names import PROBE_OBJECT
from agent.settings import ClusterSettings

EXCLUSIVE_LOCK: int = rbd.RBD_FEATURE_EXCLUSIVE_LOCK
_FAST_DIFF: int = rbd.RBD_FEATURE_OBJECT_MAP | rbd.RBD_FEATURE_FAST_DIFF
_INVALID: int = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID
#: What a replica is given of its source's features. Journaling would record every write twice;
#: the rest of RBD's features come with what they describe (a data pool, striping, a migration).
COPIED_FEATURES: int = (
    rbd.RBD_FEATURE_LAYERING
    | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
    | rbd.RBD_FEATURE_OBJECT_MAP
    | rbd.RBD_FEATURE_FAST_DIFF
    | rbd.RBD_FEATURE_DEEP_FLATTEN
)
_FEATURE_NAMES = {
    rbd.RBD_FEATURE_LAYERING: "layering",
    rbd.RBD_FEATURE_STRIPINGV2: "striping",
    rbd.RBD_FEATURE_EXCLUSIVE_LOCK: "exclusive-lock",
    rbd.RBD_FEATURE_OBJECT_MAP: "object-map",
    rbd.RBD_FEATURE_FAST_DIFF: "fast-diff",
    rbd.RBD_FEATURE_DEEP_FLATTEN: "deep-flatten",
    rbd.RBD_FEATURE_JOURNALING: "journaling",
    rbd.RBD_FEATURE_DATA_POOL: "data-pool",
    rbd.RBD_FEATURE_OPERATIONS: "operations",
    rbd.RBD_FEATURE_MIGRATING: "migrating",
    rbd.RBD_FEATURE_NON_PRIMARY: "non-primary",
}


def copied_features(features: int) -> tuple[int, tuple[str, ...]]:
    """Return the features that a replica of an image with `features` gets, and the names of those it does not.

    One writer at a time is what the exclusive lock gives, so a replica always has it.
    """
    left_out = feature_names(features & ~COPIED_FEATURES)
    return features & COPIED_FEATURES | EXCLUSIVE_LOCK, tuple(name for name in left_out if name in ("journaling", "migrating"))


def feature_names(features: int) -> tuple[str, ...]:
    """Return the names of a feature mask as `rbd` prints them."""
    return tuple(name for bit, name in _FEATURE_NAMES.items() if features & bit)


@contextlib.contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Turn whatever rados or rbd raises into one of our errors."""
    try:
        yield
    except (rbd.OSError, rados.OSError) as error:
        raise error_from(abs(error.errno or 0), doing) from error
    except (rbd.Error, rados.Error) as error:
        raise SiphonError(f"{doing}: {error}") from error


class Cluster:
    """A connection to one cluster."""

    def __init__(self, settings: ClusterSettings, timeout: float) -> None:
        """Connect; `timeout` (seconds) bounds this and every later RADOS operation."""
        where = settings.conf or os.environ.get("CEPH_CONF") or settings.cluster or "the default cluster"
        limit = str(max(1, round(timeout)))
        options = {
            "rados_osd_op_timeout": limit,
            "rados_mon_op_timeout": limit,
            "client_mount_timeout": str(max(1, min(15, round(timeout)))),
            "rbd_cache": "false",
            # What is written here never changes any more, so librbd need not copy it (on our event loop's thread).
            "rbd_disable_zero_copy_writes": "false",
            "log_to_stderr": "false",
            "err_to_stderr": "false",
        }
        if settings.keyring:
            options["keyring"] = settings.keyring
        self.user = f"client.{settings.user or 'admin'}"
        self.conf = where
        try:
            self._rados = rados.Rados(
                name=self.user,
                clustername=settings.cluster or "ceph",
                conffile=settings.conf or rados.Rados.DEFAULT_CONF_FILES,
                conf=options,
            )
        except rados.Error as error:
            raise UsageError(
                f"the Ceph configuration {where} cannot be read: {_plain(error)}",
                hint="name one with --conf (or --target-conf, --cluster, --target-cluster), or set CEPH_CONF",
            ) from error
        try:
            self._rados.connect()
        except (rados.PermissionError, rados.PermissionDeniedError) as error:
            raise SiteError(
                f"the cluster of {where} refused {self.user}", hint="check its key and keyring (--id, --keyring)"
            ) from error
        except rados.ObjectNotFound as error:
            raise UsageError(
                f"no key for {self.user} was found (configuration {where})", hint="name the user and its keyring: --id, --keyring"
            ) from error
        except rados.TimedOut as error:
            raise LinkError(
                f"no monitor of the cluster of {where} answers", hint="is the cluster up, and reachable from here?"
            ) from error
        except rados.Error as error:
            raise UsageError(
                f"cannot connect to the cluster of {where} as {self.user}: {_plain(error)}",
                hint="name the configuration with --conf (or set CEPH_CONF), the user with --id",
            ) from error
        self.fsid: str = self._rados.get_fsid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; again is harmless."""
        self._rados.shutdown()

    @property
    def address(self) -> str:
        """The client's RADOS address, by which locks and watches name it."""
        return str(self._rados.get_addrs())

    def trouble(self) -> tuple[str, ...]:
        """Return what the cluster's health says that keeps writes from getting through."""
        return trouble(self._ask("health"))

    def full(self, pool: str) -> bool:
        """Tell whether the cluster has flagged `pool` as full: writes to it would wait for ever."""
        return is_full(self._ask("osd dump"), pool)

    def _ask(self, command: str) -> bytes:
        """Return a monitor's answer in JSON, nothing if we are not allowed to look."""
        try:
            code, out, _ = self._rados.mon_command(json.dumps({"prefix": command, "format": "json"}), b"")
        except rados.Error:
            return b""
        return bytes(out) if code == 0 else b""

    def pool(self, name: str, namespace: str = "") -> Pool:
        """Open a pool (and a namespace in it); NotFoundError if there is none."""
        try:
            ioctx = self._rados.open_ioctx(name)
        except rados.ObjectNotFound as error:
            raise NotFoundError(f"there is no pool {name!r} in the cluster of {self.conf}") from error
        except rados.Error as error:
            raise SiphonError(f"pool {name!r} cannot be opened: {_plain(error)}") from error
        if namespace:
            with _explained(f"looking for the namespace {name}/{namespace}"):
                there = rbd.RBD().namespace_exists(ioctx, namespace)
            if not there:
                raise NotFoundError(f"there is no namespace {namespace!r} in pool {name!r}")
            ioctx.set_namespace(namespace)
        return Pool(ioctx, name, namespace)


class Pool:
    """A pool, or a namespace in it."""

    def __init__(self, ioctx: Any, name: str, namespace: str) -> None:
        self._ioctx = ioctx
        # The version that an operation left is asked for after it: nobody may come in between, from another thread.
        self._turn = threading.Lock()
        self.name = name
        self.namespace = namespace

    def spec(self, image: str) -> ImageSpec:
        """Return the whole name of an image here."""
        return ImageSpec(pool=self.name, image=image, namespace=self.namespace)

    def images(self) -> list[str]:
        """Return the names of the images here."""
        with _explained(f"listing the images of {self.name}"):
            return list(rbd.RBD().list(self._ioctx))

    def image_id(self, image: str) -> str | None:
        """Return the id of the image of that name, None if there is none.

        It is read from where librbd keeps it (`rbd_id.NAME`, a string behind its length, le32): opening an image
        costs five milliseconds of processor time.
        """
        raw, _ = self.read_object(f"rbd_id.{image}")
        if raw:
            return raw[4:].decode()
        try:
            with self.open(image) as opened:  # of format 1, perhaps
                return opened.id()
        except NotFoundError:
            return None

    def open(self, image: str, *, snapshot: int | None = None, writable: bool = False) -> Image:
        """Open an image, at the snapshot of that id if one is given; NotFoundError if it is not there."""
        where = self.spec(image)
        try:
            with _explained(f"opening {where}"):
                opened = rbd.Image(self._ioctx, image, read_only=not writable)
        except NotFoundError as error:
            raise NotFoundError(f"there is no image {where}") from error
        try:
            if snapshot is not None:
                with _explained(f"opening snapshot {snapshot} of {where}"):
                    opened.set_snap_by_id(snapshot)
        except BaseException:
            opened.close()
            raise
        return Image(opened, where)

    def create(self, image: str, shape: Shape, data_pool: str) -> None:
        """Create an empty image, with the cluster's usual features where the shape names none; ConflictError if it exists."""
        striping: dict[str, int] = {}
        if shape.stripe_count > 1:
            striping = {"stripe_unit": shape.stripe_unit, "stripe_count": shape.stripe_count}
        try:
            with _explained(f"creating {self.spec(image)}"):
                rbd.RBD().create(
                    self._ioctx,
                    image,
                    shape.size,
                    order=shape.order,
                    features=shape.features or None,
                    data_pool=data_pool or None,
                    **striping,
                )
        except SiphonError as error:
            if isinstance(error.__cause__, rbd.ImageExists):
                raise ConflictError(f"{self.spec(image)} exists already") from error
            raise

    def rename(self, image: str, name: str) -> None:
        """Give an image another name; ConflictError if that is taken."""
        try:
            with _explained(f"renaming {self.spec(image)} to {name}"):
                rbd.RBD().rename(self._ioctx, image, name)
        except SiphonError as error:
            if isinstance(error.__cause__, rbd.ImageExists):
                raise ConflictError(f"{self.spec(name)} exists already") from error
            raise

    def remove(self, image: str) -> None:
        """Remove an image that has no snapshots."""
        with _explained(f"removing {self.spec(image)}"):
            rbd.RBD().remove(self._ioctx, image)

    def trash(self, image: str) -> None:
        """Move an image to the trash; LockedError if somebody has it open."""
        with _explained(f"moving {self.spec(image)} to the trash"):
            rbd.RBD().trash_move(self._ioctx, image, 0)

    def read_object(self, name: str) -> tuple[bytes, int]:
        """Return a small RADOS object's content and its version; nothing and 0 if there is none."""
        try:
            with self._turn, _explained(f"reading {name}"):
                return bytes(self._ioctx.read(name, 64 << 10)), int(self._ioctx.get_last_version())
        except NotFoundError:
            return b"", 0

    def swap_object(self, name: str, data: bytes, version: int) -> bool:
        """Write a small RADOS object whole if it still has that `version` (0: is not there); tell whether."""
        try:
            with self._turn, _explained(f"writing {name}"), rados.WriteOpCtx() as operation:
                if version:
                    operation.assert_version(version)
                else:
                    operation.new(rados.LIBRADOS_CREATE_EXCLUSIVE)
                operation.write_full(data)
                self._ioctx.operate_write_op(operation, name)
        except SiphonError as error:
            # Another version answers ERANGE or EOVERFLOW, by which of the two is older.
            if getattr(error.__cause__, "errno", None) in (errno.ERANGE, errno.EOVERFLOW, errno.EEXIST):
                return False
            raise
        return True

    def write_object(self, name: str, data: bytes) -> None:
        """Write a small RADOS object whole, whatever it held."""
        with self._turn, _explained(f"writing {name}"):
            self._ioctx.write_full(name, data)

    def remove_object(self, name: str) -> None:
        """Remove a RADOS object, if it is there."""
        with self._turn, contextlib.suppress(NotFoundError), _explained(f"removing {name}"):
            self._ioctx.remove_object(name)

    def probe(self) -> None:
        """See that objects may be written and removed here; SiteError if not."""
        self.write_object(PROBE_OBJECT, b"rbd-siphon config check")
        self.remove_object(PROBE_OBJECT)

    def header_version(self, image_id: str) -> int:
        """Return the RADOS version of an image's header: another one after every lock, snapshot or setting."""
        with self._turn, _explained(f"looking at the header of image {image_id}"):
            self._ioctx.stat(f"rbd_header.{image_id}")
            return int(self._ioctx.get_last_version())


class Image:
    """An open image. Methods block, but for the awaitables at the end."""

    def __init__(self, image: Any, spec: ImageSpec) -> None:
        self._image = image
        self.spec = spec

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the image and of a lock on it; again is harmless."""
        with _explained(f"closing {self.spec}"):
            self._image.close()

    def id(self) -> str:
        """Return the image's id, which no other image ever gets."""
        return str(self._image.id())

    def size(self) -> int:
        """Return the size in bytes, of the snapshot where one is set."""
        with _explained(f"reading the size of {self.spec}"):
            return int(self._image.size())

    def shape(self) -> Shape:
        """Return how the image is laid out."""
        with _explained(f"reading the layout of {self.spec}"):
            info = self._image.stat()
            return Shape(
                size=info["size"],
                order=info["order"],
                features=self._image.features(),
                stripe_unit=self._image.stripe_unit(),
                stripe_count=self._image.stripe_count(),
            )

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return the snapshots in the user's namespace, oldest first."""
        with _explained(f"listing the snapshots of {self.spec}"):
            listed = [
                Snapshot(each["id"], each["name"], each["size"])
                for each in self._image.list_snaps()
                if each.get("namespace", 0) == rbd.RBD_SNAP_NAMESPACE_TYPE_USER
            ]
        return tuple(sorted(listed, key=lambda each: each.id))

    def regrown(self, base: int, end: int | None, size: int) -> bool:
        """Tell whether the image was smaller than `size` at a snapshot between those ids (0: nothing, None: the present).

        Then object maps lie (measured, 16.2): what was cut off there and is zeros by now shows in no whole-object diff.
        """
        with _explained(f"listing the snapshots of {self.spec}"):
            return any(each["size"] < size for each in self._image.list_snaps() if base < each["id"] < (end or each["id"] + 1))

    def parent(self) -> bool:
        """Tell whether the image is a clone."""
        try:
            self._image.parent_info()
        except rbd.ImageNotFound:
            return False
        return True

    def fast_diff(self) -> bool:
        """Tell whether the object map can be trusted for what is open here (the head or a snapshot)."""
        with _explained(f"reading the flags of {self.spec}"):
            return self._image.features() & _FAST_DIFF == _FAST_DIFF and not self._image.flags() & _INVALID

    def at(self, snapshot: int | None) -> None:
        """Look at the snapshot of that id from now on, or at the present content."""
        with _explained(f"opening snapshot {snapshot} of {self.spec}"):
            if snapshot is None:
                self._image.set_snap(None)
            else:
                self._image.set_snap_by_id(snapshot)

    def diff(self, offset: int, length: int, base: str | None, *, whole_object: bool, join: bool = True) -> Extents:
        """Return what changed from the snapshot named `base` (None: from nothing) to what is open here."""
        found = Extents(join=join)
        with _explained(f"comparing {self.spec} with {base or 'nothing'}"):
            self._image.diff_iterate(offset, length, base, found.add, include_parent=True, whole_object=whole_object)
        return found

    def taken_at(self, snapshot: int) -> str:
        """Return when a snapshot was taken (UTC, ISO 8601)."""
        with _explained(f"reading the snapshots of {self.spec}"):
            taken: datetime = self._image.get_snap_timestamp(snapshot)
            return taken.replace(tzinfo=UTC).isoformat(timespec="seconds")

    def is_protected(self, name: str) -> bool:
        """Tell whether the snapshot of that name is protected."""
        with _explained(f"reading the snapshots of {self.spec}"):
            return bool(self._image.is_protected_snap(name))

    def unprotect(self, name: str) -> None:
        """Let the snapshot of that name be removed again."""
        with _explained(f"unprotecting {self.spec}@{name}"):
            self._image.unprotect_snap(name)

    def protect(self, name: str) -> None:
        """Keep the snapshot of that name from being removed."""
        with _explained(f"protecting {self.spec}@{name}"):
            self._image.protect_snap(name)

    def metadata(self) -> dict[str, str]:
        """Return all of the image's metadata."""
        with _explained(f"reading the metadata of {self.spec}"):
            return {str(key): str(value) for key, value in self._image.metadata_list()}

    def set_metadata(self, key: str, value: str) -> None:
        """Set one entry of the image's metadata."""
        with _explained(f"writing metadata of {self.spec}"):
            self._image.metadata_set(key, value)

    def remove_metadata(self, key: str) -> None:
        """Remove one entry of the image's metadata, if it is there."""
        try:
            with _explained(f"removing metadata of {self.spec}"):
                self._image.metadata_remove(key)
        except SiphonError as error:
            if not isinstance(error.__cause__, KeyError | rbd.ImageNotFound):
                raise
        except KeyError:
            pass

    def take_snapshot(self, name: str) -> None:
        """Take a snapshot; ConflictError if the name is taken."""
        try:
            with _explained(f"taking snapshot {self.spec}@{name}"):
                self._image.create_snap(name)
        except SiphonError as error:
            if isinstance(error.__cause__, rbd.ImageExists):
                raise ConflictError(f"{self.spec}@{name} exists already") from error
            raise

    def rename_snapshot(self, name: str, new: str) -> None:
        """Give a snapshot another name."""
        with _explained(f"renaming {self.spec}@{name} to {new}"):
            self._image.rename_snap(name, new)

    def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot; LockedError if it is protected or has clones."""
        with _explained(f"removing {self.spec}@{name}"):
            self._image.remove_snap(name)

    def roll_back(self, name: str) -> None:
        """Make the present content (and size) that of a snapshot."""
        with _explained(f"rolling {self.spec} back to {name}"):
            self._image.rollback_to_snap(name)

    def resize(self, size: int) -> None:
        """Grow or shrink; what lies beyond a smaller size is gone."""
        with _explained(f"resizing {self.spec} to {size} bytes"):
            self._image.resize(size)

    def lock(self) -> None:
        """Take the exclusive lock and keep it until closed or unlocked.

        LockedError at once if its owner is alive and keeps it; waits while a dead owner does not answer.
        """
        with _explained(f"locking {self.spec}"):
            self._image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)

    def unlock(self) -> None:
        """Give the exclusive lock back."""
        with _explained(f"unlocking {self.spec}"):
            self._image.lock_release()

    def owns_lock(self) -> bool:
        """Tell whether the exclusive lock is ours, as far as we know."""
        with _explained(f"looking for the lock of {self.spec}"):
            return bool(self._image.is_exclusive_lock_owner())

    def lock_owner(self) -> str:
        """Return the RADOS address of the exclusive lock's owner, "" if nobody owned it when the image was opened."""
        with _explained(f"looking for the lock of {self.spec}"):
            found = self._image.list_lockers()
        # librbd lists locks that people took by hand (rbd lock add) in the same place, under their own tags.
        if not found or found["tag"] != "internal":
            return ""
        return next((str(address) for _, _, address in found["lockers"]), "")

    def break_lock(self, owner: str) -> None:
        """Take the lock from `owner` and fence it: the cluster refuses its writes from now on."""
        with contextlib.suppress(NotFoundError), _explained(f"breaking the lock of {owner} on {self.spec}"):
            self._image.lock_break(rbd.RBD_LOCK_MODE_EXCLUSIVE, owner)

    def watchers(self) -> tuple[str, ...]:
        """Return the RADOS addresses of the clients that have the image open for writing."""
        with _explained(f"listing the watchers of {self.spec}"):
            return tuple(str(each["addr"]) for each in self._image.watchers_list())

    async def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`."""
        data = await self._aio(f"reading {self.spec}", lambda done: self._image.aio_read(offset, length, done))
        if data is None or len(data) != length:
            raise SiphonError(f"reading {self.spec}: {len(data or b'')} of {length} bytes at {offset}")
        return data

    async def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`; durable when this returns."""
        await self._aio(f"writing {self.spec}", lambda done: self._image.aio_write(data, offset, done), data)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make an extent read as zeros, freeing what it held; durable when this returns."""
        await self._aio(f"zeroing {self.spec}", lambda done: self._image.aio_write_zeroes(offset, length, done))

    async def flush(self) -> None:
        """Wait until all completed writes are durable."""
        await self._aio(f"flushing {self.spec}", self._image.aio_flush)

    def _aio(self, doing: str, start: Callable[[Callable[..., None]], object], kept: bytes = b"") -> asyncio.Future[bytes | None]:
        """Start one asynchronous operation and return its future; `kept` lives until librbd is done with it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bytes | None] = loop.create_future()

        def done(completion: Any, data: bytes | None = None, kept: bytes = kept) -> None:  # noqa: ARG001  # only held
            # On one of librbd's threads: cross over once, and never raise.
            code = completion.get_return_value()
            with contextlib.suppress(RuntimeError):  # the loop is gone at the very end of a process
                loop.call_soon_threadsafe(_settle, future, doing, code, data)

        with _explained(doing):
            start(done)
        return future


def _settle(future: asyncio.Future[bytes | None], doing: str, code: int, data: bytes | None) -> None:
    if future.done():
        return
    if code < 0:
        future.set_exception(error_from(-code, doing))
    else:
        future.set_result(data)


def _plain(error: BaseException) -> str:
    """Return an error's words without Ceph's '[errno N] RADOS ...' armour."""
    words = str(error)
    inside = words[words.rfind("(") + 1 : -1] if words.endswith(")") else words
    return inside or words
