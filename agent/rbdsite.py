"""An image at a site that has nothing but Ceph's own tools: every question and change is a command over SSH.

Each command that changes the image ends by noting when the image's lock left its last trace, even if
we are gone by then. Where the note still holds nobody else has written: that is the proof on which
what there is of an unfinished step may be rolled back.
"""

from __future__ import annotations

import asyncio
import shlex
from contextlib import suppress
from dataclasses import replace

import msgspec

from agent import rbdtool
from agent.continuity import Standing
from agent.errnos import error_from
from agent.errors import ConflictError, LinkError, NotFoundError, SiphonError, SiteError
from agent.model import ImageSpec, Mark, Replica, Snapshot
from agent.rbdtool import Tool
from agent.remote import Ran, Shell
from agent.threads import blocking

#: How long a note may come after the client it is about has left, and how often we look (seconds).
_NOTE_LATE, _AGAIN = 3.0, 0.5
_NO_COMMAND = 127


class Site:
    """Commands at the target, their failures as our errors."""

    def __init__(self, shell: Shell, tool: Tool, timeout: float) -> None:
        self.shell = shell
        self.tool = tool
        self.timeout = timeout
        self._loop = asyncio.get_running_loop()

    async def run(self, words: list[str], doing: str, *, slow: bool = False) -> bytes:
        """Run a command and return what it printed; `slow` ones may take as long as they want."""
        try:
            async with asyncio.timeout(None if slow else self.timeout):
                ran = await self.shell.run(shlex.join(words))
        except TimeoutError:
            raise LinkError(f"{doing}: the target's cluster does not answer within {self.timeout:.0f} s") from None
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
    if ran.status is None:
        return LinkError(f"{doing}: the command was killed: {said or 'it said nothing'}")
    if ran.status == _NO_COMMAND:
        return SiteError(
            f"there is no rbd at the target: {said}", hint="--worker rbd needs rbd, rados and ceph there (ceph-common)"
        )
    if "connect to the cluster" in ran.err or "connecting to the cluster" in ran.err:
        return SiteError(
            f"{doing}: rbd at the target cannot connect to its cluster: {said}",
            hint="name it with --target-conf, the user with --target-id and --target-keyring",
        )
    error = error_from(ran.status, doing)
    return type(error)(f"{error} ({said})" if said else str(error), hint=error.hint)


class RbdImage:
    """An image at the target, worked on by commands: a `Kept` of agent/upkeep.py. Methods block."""

    def __init__(self, site: Site, spec: ImageSpec, image_id: str) -> None:
        self.spec = spec
        self._site = site
        self._tool = site.tool
        self._seen: rbdtool.Look | None = None
        self._id = image_id

    def look(self) -> rbdtool.Look:
        """Look anew; between two changes of ours, what was seen last is taken as true."""
        self._seen = rbdtool.looked(self._ask(rbdtool.looking(self._tool, self.spec, self._id), "opening"))
        return self._seen

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
        self._change(self._tool.snap("rm", "--no-progress", at=self.spec, snapshot=name), "removing a snapshot of")
        self._seen = replace(before, snapshots=tuple(each for each in before.snapshots if each.name != name))

    def roll_back(self, name: str) -> None:
        """Make the present content that of a snapshot."""
        self._change(self._tool.snap("rollback", "--no-progress", at=self.spec, snapshot=name), "rolling back")

    def resize(self, size: int) -> None:
        """Change the size, bytes."""
        self._change(self._tool.rbd("resize", f"--size={size}B", "--allow-shrink", "--no-progress", at=self.spec), "resizing")

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

    def untouched(self) -> bool:
        """Tell whether nobody has taken the lock since our last command."""
        words = rbdtool.comparing(self._tool, self.spec, self._id)
        return rbdtool.untouched(self._ask(words, "looking when somebody changed"))

    def proof(self) -> str:
        """Return a script that notes when the image was last changed."""
        return rbdtool.proof(self._tool, self.spec, self._id)

    def _ask(self, words: list[str], doing: str) -> bytes:
        return self._site.wait(words, f"{doing} {self.spec}")

    def _change(self, words: list[str], doing: str) -> None:
        command = rbdtool.shell(rbdtool.proving(words, self.proof()))
        self._seen = None
        self._site.wait(command, f"{doing} {self.spec}", slow=True)


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
    owner = (await blocking(image.look)).locker
    if owner is not None:
        return Standing.UNSURE if owner.address == mark.holder else Standing.TOUCHED
    until = asyncio.get_running_loop().time() + _NOTE_LATE
    while not await blocking(image.untouched):
        if asyncio.get_running_loop().time() > until:
            return Standing.TOUCHED
        await asyncio.sleep(_AGAIN)
    return Standing.UNSURE
