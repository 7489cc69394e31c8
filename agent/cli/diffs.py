"""`rbd-siphon diff`, `export-diff`, `import-diff`, `merge-diff`: what `rbd` does with diffs, and what it does not check."""

from __future__ import annotations

import contextlib
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from agent.cli.options import Conf, Force, Id, Keyring, Name, Timeout
from agent.cli.outcome import carry_out, say
from agent.cli.running import run
from agent.errors import DataError, NotFoundError, UsageError
from agent.files import STDIO, Reading, digest_of, whole
from agent.listing import Format, listing
from agent.manifest import Manifest, manifest_name, packed, parsed
from agent.settings import ClusterSettings
from agent.spec import parse_source
from agent.threads import blocking

ImageArgument = Annotated[
    str, typer.Argument(metavar="IMAGE[@SNAP]", help="pool/image or pool/namespace/image; without @SNAP: its present content.")
]
FromSnap = Annotated[str, typer.Option("--from-snap", help="Start point (default: the image's creation).")]


def diff(
    image: ImageArgument,
    from_snap: FromSnap = "",
    whole_object: Annotated[bool, typer.Option("--whole-object", help="Objects, not the extents in them.")] = False,
    form: Annotated[str, typer.Option("--format", help="plain, json or xml.")] = "plain",
    pretty: Annotated[bool, typer.Option("--pretty-format", help="Indent JSON and XML.")] = False,
    timeout: Timeout = 60.0,
    conf: Conf = "",
    cluster: Name = "",
    user: Id = "",
    keyring: Keyring = "",
) -> None:
    """List what changed, byte for byte as `rbd diff` prints it."""
    from agent.source import listed
    from agent.sources import between

    async def work() -> None:
        async with between(parse_source(image), from_snap, _settings(conf, cluster, user, keyring), timeout) as span:
            windows = [each async for each in listed(span.image, span.base, span.end, whole_object=whole_object)]
        for text in listing(windows, _format(form), pretty=pretty):
            sys.stdout.write(text)

    carry_out(lambda: run(work()))


def export_diff(
    image: ImageArgument,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to write; - is standard output.")],
    from_snap: FromSnap = "",
    sidecar: Annotated[
        bool, typer.Option("--sidecar", help="Write FILE.json too: whose snapshots they are, and a digest.")
    ] = False,
    force: Force = False,
    timeout: Timeout = 60.0,
    conf: Conf = "",
    cluster: Name = "",
    user: Id = "",
    keyring: Keyring = "",
) -> None:
    """Write what changed as a diff that `rbd import-diff` takes too."""
    from agent.exporting import export_diff as export
    from agent.sources import between

    async def work() -> None:
        if sidecar and file == STDIO:
            raise UsageError("a manifest lies beside a file, and there is none", hint="name a file, or leave --sidecar out")
        async with between(parse_source(image), from_snap, _settings(conf, cluster, user, keyring), timeout) as span:
            with ExitStack() as files:
                # Entered first, so renamed last: a manifest never lies beside a file that is not there yet.
                beside = files.enter_context(whole(manifest_name(file), force=force)) if sidecar else None
                out = files.enter_context(whole(file, force=force))
                manifest = await export(span.pool, span.image, span.base, span.end, out, span.fsid)
                if beside is not None:
                    beside.write(packed(manifest))
        if not sidecar:
            await blocking(_forget_manifest, file)

    carry_out(lambda: run(work()))


def import_diff(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The diff; - is standard input.")],
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="pool/image or pool/namespace/image.")] = "",
    to_file: Annotated[str, typer.Option("--to-file", metavar="RAW", help="Apply it to a raw file instead of an image.")] = "",
    allow_shrink: Annotated[bool, typer.Option("--allow-shrink", help="Let the diff make the image smaller.")] = False,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Compare names only, as `rbd import-diff` does.")] = False,
    manifest: Annotated[str, typer.Option("--manifest", help="The diff's manifest (default: FILE.json, if it is there).")] = "",
    timeout: Timeout = 60.0,
    conf: Conf = "",
    cluster: Name = "",
    user: Id = "",
    keyring: Keyring = "",
) -> None:
    """Apply a diff to an image, once it is proven to fit; an import that was interrupted goes on."""
    from agent.cluster import Cluster
    from agent.difffile import DiffFile
    from agent.importing import DiffImport, Options

    def onto_file() -> None:
        from agent.rawfile import apply

        with Reading(file).open() as source:
            known = _manifest(file, manifest)
            # Of a pipe it is not known before the end what comes through it, whatever a manifest says.
            digest = digest_of(source)[0] if source.regular else ""
            if known is not None and source.regular:
                _as_told(source, known)
            apply(DiffFile(source), digest, to_file, known, allow_shrink=allow_shrink)

    async def work() -> None:
        spec = parse_source(image)
        if spec.snapshot:
            raise UsageError(f"{image} names a snapshot: a diff is applied to an image", hint="leave @… out")
        with Reading(file).open() as source:
            known = _manifest(file, manifest)
            if known is not None and source.regular:
                await blocking(_as_told, source, known)
            read = await blocking(DiffFile, source)
            connected = await blocking(Cluster, _settings(conf, cluster, user, keyring), timeout)
            pool = await blocking(connected.pool, spec.image.pool, spec.image.namespace)
            options = Options(allow_shrink=allow_shrink, unchecked=unchecked)
            result = await DiffImport(connected, pool, spec.image, known, options, say).run(read)
            if result.state == "up-to-date":
                say(f"{spec.image}@{read.header.end} is there already")
            # After an error the process ends with the connection open: an operation may be stuck in it.
            await blocking(connected.close)

    if bool(image) == bool(to_file):
        carry_out(_neither)
    carry_out(onto_file if to_file else lambda: run(work()))


def merge_diff(
    files: Annotated[list[str], typer.Argument(metavar="FIRST SECOND [MORE…] OUT", help="Consecutive diffs; - for a pipe.")],
    force: Force = False,
) -> None:
    """Merge any number of consecutive diffs into one."""
    from agent.diff import Encoder
    from agent.difffile import for_merging
    from agent.merge import joined, merged

    def work() -> None:
        if len(files) < 3:
            raise UsageError("merging takes two diffs at least, and a file to write", hint="rbd-siphon merge-diff FIRST SECOND OUT")
        *names, out = files
        if names.count(STDIO) > 1:
            raise UsageError("standard input can be one of the diffs only")
        with ExitStack() as stack:
            inputs = [for_merging(stack.enter_context(Reading(name).open())) for name in names]
            header = joined([(name, each.header) for name, each in zip(names, inputs, strict=True)])
            with whole(out, force=force) as writing:
                gathered: list[bytes | memoryview] = []
                for part in merged(inputs, header, Encoder()):
                    gathered.append(part)
                    if len(part) > 64 << 10 or len(gathered) > 1000:
                        writing.write(*gathered)
                        gathered.clear()
                writing.write(*gathered)
        _forget_manifest(out)

    carry_out(work)


def _forget_manifest(file: str) -> None:
    """Remove the manifest of a file that is there no more: it lies beside another one now."""
    if file != STDIO and _lying_beside(file) is not None:
        Path(manifest_name(file)).unlink(missing_ok=True)


def _lying_beside(file: str) -> Manifest | None:
    with contextlib.suppress(UsageError, OSError):  # somebody else's file of that name
        return parsed(Path(manifest_name(file)).read_bytes(), "")
    return None


def _neither() -> None:
    raise UsageError("say where the diff goes: an image, or --to-file", hint="rbd-siphon import-diff FILE POOL/IMAGE")


def _settings(conf: str, cluster: str, user: str, keyring: str) -> ClusterSettings:
    return ClusterSettings(conf, cluster, user, keyring).completed(os.environ)


def _format(text: str) -> Format:
    match text:
        case "plain" | "json" | "xml":
            return text
        case _:
            raise UsageError(f"there is no format {text!r}", hint="--format plain, json or xml")


def _manifest(file: str, named: str) -> Manifest | None:
    """Return the manifest that was named, or that lies beside the file, if one does."""
    if file == STDIO and not named:
        return None
    path = Path(named or manifest_name(file))
    try:
        return parsed(path.read_bytes(), str(path))
    except FileNotFoundError:
        if named:
            raise NotFoundError(f"there is no manifest {named}") from None
        return None
    except OSError as error:
        raise UsageError(f"the manifest {path} cannot be read: {error.strerror}") from error


def _as_told(source: Reading, manifest: Manifest) -> None:
    """DataError if the file is not the one its manifest tells of: found before anything is written."""
    if digest_of(source) != (manifest.digest, manifest.bytes):
        raise DataError(
            f"{source.name} is not what its manifest says: it was changed or cut", hint="get it again from where it came"
        )
