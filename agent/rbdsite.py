"""An image at a site that has nothing but Ceph's own tools: every question and change is a command over SSH.

Each command that changes the image ends by noting when the image's lock left its last trace, even if
we are gone by then. Where the note still holds nobody else has written: that is the proof on which
what there is of an unfinished step may be rolled back.
"""

from __future__ import annotations

import asyncio
import errno
import re
import shlex
from contextlib import suppress
from dataclasses import replace

import msgspec

from agent import rbdtool
from agent.continuity import Standing
from agent.errnos import error_from
from agent.errors import ConflictError, LinkError, LockedError, NotFoundError, SiphonError, SiteError
from agent.model import ImageSpec, Mark, Replica, Snapshot
from agent.rbdtool import Tool
from agent.remote import Ran, Shell
from agent.threads import blocking

#: How long a note may come after the client it is about has left, and how often we look (seconds).
_NOTE_LATE, _AGAIN = 3.0, 0.5
_NO_COMMAND, _BY_SIGNAL = 127, 128
_NAME_IT = "name the cluster there with --target-conf, the user with --target-id and --target-keyring"


class Site:
    """Commands at the target, their failures as our errors."""

    def __init__(self, shell: Shell, tool: Tool, timeout: float) -> None:
        self.shell = shell
        self.tool = tool
        self.timeout = timeout
        self._loop = asyncio.get_running_loop()

    async def run(self, words: list[str], doing: str, *, slow: bool = False) -> bytes:
        """Run a command and return what it printed; `slow` ones may take as long as the cluster answers others meanwhile."""
        running = asyncio.ensure_future(self.shell.run(shlex.join(words)))
        try:
            while not (await asyncio.wait([running], timeout=self.timeout))[0]:
                if not slow:
                    raise LinkError(f"{doing}: the target's cluster does not answer within {self.timeout:.0f} s")
                await self.run(self.tool.ceph("osd", "dump", "--format=json"), f"{doing}: asking whether the cluster is there")
        finally:
            running.cancel()
        ran = running.result()
        if ran.status == 0:
            return ran.out
        raise failure(ran, doing)

    def wait(self, words: list[str], doing: str, *, slow: bool = False) -> bytes:
        """Like `run`, for a thread that is not the loop's (blocks)."""
        return asyncio.run_coroutine_threadsafe(self.run(words, doing, slow=slow), self._loop).result()

    async def found(self, spec: ImageSpec) -> RbdImage | None:
        """Return the image of that name, None if there is none."""
        with suppress(NotFoundError):
            out = await self.run(self.tool.rbd("info", "--format=json", at=spec), f"opening {spec}")
            return RbdImage(self, spec, rbdtool.info(out).id)
        # The image is missing, or its pool or namespace: those are told apart by listing.
        place = "/".join(part for part in (spec.pool, spec.namespace) if part)
        try:
            await self.run(self.tool.names(spec), f"listing the images of {place}")
        except NotFoundError as error:
            raise ConflictError(f"the target cannot hold {spec}: there is no {place}", hint="make it there first") from error
        return None


def failure(ran: Ran, doing: str) -> SiphonError:
    """Return the error that a command's end stands for."""
    said = ran.err.splitlines()[-1] if ran.err else ""
    if ran.status is None or (ran.status > _BY_SIGNAL and ran.status != rbdtool.TAKEN):
        return LinkError(f"{doing}: the command was killed: {said or 'it said nothing'}")
    if ran.status == rbdtool.TAKEN:
        return LockedError(
            f"{doing}: another client took the image's lock just now", hint="see who it is, then run the same command again"
        )
    if ran.status == _NO_COMMAND:
        return SiteError(
            f"there is no rbd at the target: {said}", hint="--worker rbd needs rbd, rados and ceph there (ceph-common)"
        )
    # rados and ceph end with 1 whatever it was; the number stands in their words.
    told = re.search(r"\((\d+)\)|RADOS (\w+ ?\w*) \(", ran.err)
    code = int(told[1]) if told and told[1] else ran.status
    if "connect" in ran.err and "cluster" in ran.err:
        text, hint = f"{doing}: the target's host cannot connect to its cluster: {said}", _NAME_IT
        lasting = code in (errno.ENOENT, errno.EPERM, errno.EACCES) or "keyring" in ran.err or "conf" in ran.err
        return SiteError(text, hint=hint) if lasting else LinkError(text, hint=hint)
    if code == 1 and ran.status == 1 and not told:
        return SiteError(f"{doing}: {said or 'the command failed and said nothing'}", hint=_NAME_IT)
    error = error_from(code, doing)
    return type(error)(f"{error} ({said})" if said else str(error), hint=error.hint)


class RbdImage:
    """An image at the target, worked on by commands: a `Kept` of agent/upkeep.py. Methods block."""

    def __init__(self, site: Site, spec: ImageSpec, image_id: str) -> None:
        self.spec = spec
        self._site = site
        self._tool = site.tool
        self._seen: rbdtool.Look | None = None
        self._id = image_id
        self._trace = ""

    def look(self) -> rbdtool.Look:
        """Look anew; between two changes of ours, what was seen last is taken as true."""
        seen = rbdtool.looked(self._ask(rbdtool.looking(self._tool, self.spec, self._id), "opening"))
        if seen.info.id != self._id:
            raise ConflictError(f"{self.spec} is another image by now (id {seen.info.id}, not {self._id})")
        self._seen = seen
        return seen

    def id(self) -> str:
        """Return the image's id."""
        return self._id

    def size(self) -> int:
        """Return the size in bytes."""
        return (self._seen or self.look()).info.size

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return the snapshots in the user's namespace, oldest first."""
        return (self._seen or self.look()).snapshots

    def metadata(self) -> dict[str, str]:
        """Return the metadata that is ours."""
        return (self._seen or self.look()).metadata

    def set_metadata(self, key: str, value: str) -> None:
        """Set one entry of the image's metadata."""
        before = self._seen or self.look()
        self._change(self._tool.image_meta("set", key, value, at=self.spec), "writing metadata of")
        self._seen = replace(before, metadata=before.metadata | {key: value})

    def remove_metadata(self, key: str) -> None:
        """Remove one entry of the image's metadata, if it is there."""
        before = self._seen or self.look()
        with suppress(NotFoundError):
            self._change(self._tool.image_meta("remove", key, at=self.spec), "removing metadata of")
        self._seen = replace(before, metadata={name: value for name, value in before.metadata.items() if name != key})

    def take_snapshot(self, name: str) -> None:
        """Make a snapshot of the present content."""
        self._change(self._tool.snap("create", "--no-progress", at=self.spec, snapshot=name), "taking a snapshot of")

    def rename_snapshot(self, name: str, new: str) -> None:
        """Give a snapshot another name."""
        before = self._seen or self.look()
        there = self._tool.destination(self.spec, new)
        self._change(self._tool.snap("rename", *there, at=self.spec, snapshot=name), "renaming a snapshot of")
        renamed = (msgspec.structs.replace(each, name=new) if each.name == name else each for each in before.snapshots)
        self._seen = replace(before, snapshots=tuple(renamed))

    def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot."""
        before = self._seen or self.look()
        self._change(self._tool.snap("rm", "--no-progress", at=self.spec, snapshot=name), "removing a snapshot of", slow=True)
        self._seen = replace(before, snapshots=tuple(each for each in before.snapshots if each.name != name))

    def roll_back(self, name: str) -> None:
        """Make the present content that of a snapshot."""
        self._change(self._tool.snap("rollback", "--no-progress", at=self.spec, snapshot=name), "rolling back", slow=True)

    def resize(self, size: int) -> None:
        """Change the size, bytes."""
        self._change(
            self._tool.rbd("resize", f"--size={size}B", "--allow-shrink", "--no-progress", at=self.spec), "resizing", slow=True
        )

    def break_lock(self, locker: rbdtool.Locker) -> None:
        """Take the lock from its owner and fence it."""
        with suppress(NotFoundError):
            self._change(self._tool.lock("rm", locker.id, locker.locker, at=self.spec), "breaking the lock of")

    def fence(self, address: str) -> None:
        """Have the cluster refuse every write of the client at `address`."""
        self._ask(self._tool.ceph("osd", "blocklist", "add", address), "fencing our own cut-off import into")

    def changed(self, since: str) -> int:
        """Return how many bytes the objects have that changed since a snapshot ("": since creation)."""
        start = [f"--from-snap={since}"] if since else []
        words = self._tool.rbd("diff", "--whole-object", "--format=json", *start, at=self.spec)
        return rbdtool.changed(self._site.wait(words, f"comparing {self.spec} with {since or 'nothing'}", slow=True))

    def note(self) -> rbdtool.Note:
        """Return whether anybody has taken the lock since our last command."""
        return rbdtool.note(self._ask(rbdtool.comparing(*self._noted()), "looking when somebody changed"))

    def take_note(self) -> None:
        """Note the lock's trace as it is now: what comes from here on must be ours."""
        self._ask(rbdtool.shell(rbdtool.noting(*self._noted())), "noting the state of")

    def importing(self) -> list[str]:
        """Return the command that a step's diff is sent to."""
        return rbdtool.importing(*self._noted())

    def watchers(self) -> tuple[str, ...]:
        """Return the addresses of the clients that have the image open for writing."""
        return rbdtool.watchers(self._ask(self._tool.rbd("status", "--format=json", at=self.spec), "listing the watchers of"))

    def locker(self) -> rbdtool.Locker | None:
        """Return who owns librbd's lock."""
        return rbdtool.locker(self._ask(self._tool.lock("ls", "--format=json", at=self.spec), "looking for the lock of"))

    def disturbed(self) -> tuple[bytes, tuple[str, ...]]:
        """Return when somebody last opened the image for writing, and who has it open."""
        words = rbdtool.disturbing(self._tool, self.spec, self._id)
        return rbdtool.disturbed(self._ask(words, "looking who opened"))

    def _noted(self) -> tuple[Tool, ImageSpec, str, str]:
        if not self._trace:
            self._trace = rbdtool.trace_object(self._id, (self._seen or self.look()).info.features)
        return self._tool, self.spec, self._trace, rbdtool.lease_object(self._id)

    def _ask(self, words: list[str], doing: str) -> bytes:
        return self._site.wait(words, f"{doing} {self.spec}")

    def _change(self, words: list[str], doing: str, *, slow: bool = False) -> None:
        command = rbdtool.changing(*self._noted(), words)
        self._seen = None
        self._site.wait(command, f"{doing} {self.spec}", slow=slow)


async def judged(image: RbdImage, replica: Replica, stand: Standing | None) -> Replica:
    """Return `replica` with its head judged: by `stand` in the middle of a step, by its content otherwise."""
    if replica.mark is not None and stand is not None:
        return msgspec.structs.replace(replica, head="touched" if stand is Standing.TOUCHED else "unsure")
    newest = max(replica.origins().values(), key=lambda each: each.id, default=None)
    differs = await blocking(image.changed, newest.name if newest else "")
    if newest is not None and newest.size != replica.size:
        differs = max(differs, 1)
    return msgspec.structs.replace(replica, head="touched" if differs else "clean", differs=differs)


async def standing(image: RbdImage, mark: Mark) -> Standing:
    """Tell whether anybody else can have written since our step stopped."""
    seen = await blocking(image.look)
    note = await blocking(image.note)
    owner = seen.locker
    if owner is not None:
        # Its watch is gone, or it would not be asked: our dead import's, or our command's that the host died with.
        ours = owner.address == mark.holder or (note.working and owner.address not in seen.watchers)
        return Standing.UNSURE if ours else Standing.TOUCHED
    until = asyncio.get_running_loop().time() + _NOTE_LATE
    while not note.same:
        if asyncio.get_running_loop().time() > until:
            return Standing.TOUCHED
        await asyncio.sleep(_AGAIN)
        note = await blocking(image.note)
    return Standing.UNSURE
