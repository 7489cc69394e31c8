"""`rbd-siphon export`, `import` and `inspect`: whole images in both of rbd's formats, and looking into files."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from agent.cli.options import Conf, Force, Id, Keyring, Name, Timeout
from agent.cli.outcome import carry_out, say
from agent.cli.running import run
from agent.errors import DataError, UsageError
from agent.settings import ClusterSettings
from agent.spec import parse_source


def export(
    image: Annotated[str, typer.Argument(metavar="IMAGE[@SNAP]", help="pool/image or pool/namespace/image.")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to write; - is standard output.")],
    form: Annotated[int, typer.Option("--export-format", min=1, max=2, help="1: the content, 2: with snapshots and metadata.")] = 1,
    force: Force = False,
    timeout: Timeout = 60.0,
    conf: Conf = "",
    cluster: Name = "",
    user: Id = "",
    keyring: Keyring = "",
) -> None:
    """Write an image to a file that `rbd import` takes too."""
    from agent.exporting import export_image, export_raw
    from agent.files import whole
    from agent.sources import between

    async def work() -> None:
        settings = ClusterSettings(conf, cluster, user, keyring).completed(os.environ)
        async with between(parse_source(image), "", settings, timeout) as one:
            with whole(file, force=force) as out:
                await (export_raw if form == 1 else export_image)(one.pool, one.image, one.end, out)

    carry_out(lambda: run(work()))


def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An export; - is standard input.")],
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The image to make.")],
    form: Annotated[int, typer.Option("--export-format", min=0, max=2, help="1 or 2 (default: what the file is).")] = 0,
    object_size: Annotated[str, typer.Option("--object-size", help="Object size, such as 64K or 4M.")] = "",
    data_pool: Annotated[str, typer.Option("--data-pool", help="Where the data goes.")] = "",
    timeout: Timeout = 60.0,
    conf: Conf = "",
    cluster: Name = "",
    user: Id = "",
    keyring: Keyring = "",
) -> None:
    """Make an image from an export: the content alone, or with its snapshots and metadata."""
    from agent.cluster import Cluster
    from agent.files import Reading
    from agent.restoring import Layout, import_image
    from agent.threads import blocking

    async def work() -> None:
        spec = parse_source(image)
        if spec.snapshot:
            raise UsageError(f"{image} names a snapshot: an import makes an image", hint="leave @… out")
        layout = Layout(_order(object_size), data_pool)
        with Reading(file).open() as source:
            connected = await blocking(Cluster, ClusterSettings(conf, cluster, user, keyring).completed(os.environ), timeout)
            try:
                pool = await blocking(connected.pool, spec.image.pool, spec.image.namespace)
                await import_image(pool, spec.image, source, form, layout, say)
            finally:
                await blocking(connected.close)

    carry_out(lambda: run(work()))


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A diff or an export of format 2; - is standard input.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    extents: Annotated[bool, typer.Option("--extents", help="List every record too.")] = False,
    digest: Annotated[str, typer.Option("--digest", help="sha256 or xxh3 of the whole file.")] = "",
) -> None:
    """Say what a file holds, whether it is whole, and where it is damaged; exit code 6 if it is."""
    from agent.cli.facts import show
    from agent.files import Reading

    def work() -> None:
        with Reading(file).open() as source:
            if damage := show(source, file, as_json=json, extents=extents, digest=digest):
                raise DataError(f"{source.name}: {damage}")

    carry_out(work)


def _order(text: str) -> int:
    """Return the power of two that a size such as 64K or 4M is; 0 for none."""
    if not text:
        return 0
    units = {"K": 10, "M": 20, "": 0, "B": 0}
    number, unit = text.rstrip("KMBkmb"), text[len(text.rstrip("KMBkmb")) :].upper()
    if number.isdecimal() and unit in units:
        size = int(number) << units[unit]
        if size & (size - 1) == 0 and 1 << 12 <= size <= 1 << 25:
            return size.bit_length() - 1
    raise UsageError(f"{text!r} is no object size", hint="a power of two from 4K to 32M")
