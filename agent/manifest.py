"""What a diff file is, beside it: whose snapshots it leads from and to, and a digest of its bytes. Pure.

A diff itself names snapshots and nothing more. The manifest is a small JSON document (FILE.json)
that carries their identities, so that a diff of another image, or of a snapshot remade under the
same name, is told apart.
"""

from __future__ import annotations

import msgspec

from agent.errors import UsageError
from agent.model import ImageIdentity, Snapshot, Value

#: Version of this document's form.
FORM = 1


class Point(Value, frozen=True):
    """A snapshot, and when it was taken (UTC, ISO 8601)."""

    snapshot: Snapshot
    taken_at: str = ""


class Manifest(Value, frozen=True):
    """A diff file's identity.

    `base` is None for a diff from the image's creation, `end` None for one to the image's present
    content. `size` is the image's at the end, `bytes` the file's; `data` and `zeros` count bytes in
    records. `digest` is the xxh3-128 of the file, 32 hexadecimal digits.
    """

    source: ImageIdentity
    image: str
    base: Point | None
    end: Point | None
    size: int
    records: int
    data: int
    zeros: int
    bytes: int
    digest: str
    made_at: str
    tool: str
    form: int = FORM


def manifest_name(file: str) -> str:
    """Return where the manifest of a file lies."""
    return f"{file}.json"


def packed(manifest: Manifest) -> bytes:
    """Return the document."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def parsed(document: bytes, where: str) -> Manifest:
    """Return the manifest in `document`; UsageError, naming `where` it lies, if it is none or of a later form."""
    try:
        manifest = msgspec.json.decode(document, type=Manifest)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{where} is no manifest of a diff: {error}") from error
    if manifest.form > FORM:
        raise UsageError(f"{where} was written by a later version of rbd-siphon ({manifest.tool})", hint="upgrade rbd-siphon here")
    return manifest
