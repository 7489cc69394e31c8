"""What a person types is read as `rbd` reads it, or refused with what to write instead."""

from __future__ import annotations

import pytest

from agent.errors import UsageError
from agent.model import ImageSpec
from agent.spec import parse_source, parse_target

SOURCE = ImageSpec(pool="vms", image="web-1", namespace="blue")


@pytest.mark.parametrize(
    ("text", "image", "snapshot"),
    [
        ("vms/web-1", ImageSpec("vms", "web-1"), ""),
        ("vms/blue/web-1", ImageSpec("vms", "web-1", "blue"), ""),
        ("vms/web-1@nightly", ImageSpec("vms", "web-1"), "nightly"),
        ("web-1", ImageSpec("rbd", "web-1"), ""),
        ("vms/web 1:x", ImageSpec("vms", "web 1:x"), ""),
    ],
)
def test_a_source_is_pool_namespace_image_snapshot(text: str, image: ImageSpec, snapshot: str) -> None:
    read = parse_source(text)
    assert (read.image, read.snapshot) == (image, snapshot)


@pytest.mark.parametrize("text", ["", "vms/", "vms/blue/", "/web", "a/b/c/d", "vms/web@", "vms/web@a@b", "vms//web", "vms/web@a/b"])
def test_what_is_no_image_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_source(text)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("text", "host", "user", "port", "image"),
    [
        ("dr:vms-dr/web", "dr", "", 0, ImageSpec("vms-dr", "web")),
        ("root@dr:vms-dr", "dr", "root", 0, ImageSpec("vms-dr", "web-1")),
        ("root@dr:2222:vms-dr/green/", "dr", "root", 2222, ImageSpec("vms-dr", "web-1", "green")),
        ("dr:vms-dr/", "dr", "", 0, ImageSpec("vms-dr", "web-1")),
        ("dr:vms-dr/green/web", "dr", "", 0, ImageSpec("vms-dr", "web", "green")),
        ("dr:", "dr", "", 0, SOURCE),
        ("dr:2222", "dr", "", 0, ImageSpec("2222", "web-1")),
        ("[fd00::7]:22:p/i", "fd00::7", "", 22, ImageSpec("p", "i")),
    ],
)
def test_a_target_is_a_host_and_a_place(text: str, host: str, user: str, port: int, image: ImageSpec) -> None:
    read = parse_target(text, SOURCE)
    assert (read.host, read.user, read.port, read.image) == (host, user, port, image)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dr",
        "vms/web",
        ":vms",
        "root@:vms",
        "-oProxyCommand=x:vms",
        "dr:a/b/c/d",
        "dr:a//b",
        "dr:a/b/c/",
        "dr:a/b@s",
        "dr:99999:p/i",
    ],
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_target(text, SOURCE)
    assert refused.value.hint


def test_specs_are_printed_as_they_are_read() -> None:
    assert str(parse_target("root@dr:2222:a/b/c", SOURCE)) == "root@dr:2222:a/b/c"
    assert str(SOURCE) == "vms/blue/web-1"
