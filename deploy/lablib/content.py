"""What a snapshot holds, as one SHA-256 over what is allocated: for images too large to export.

A program of its own, since it needs Ceph's bindings and the lab itself does not:
python3 content.py POOL/IMAGE@SNAPSHOT, with CEPH_CONF and CEPH_ARGS in the environment.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

BLOCK = 4 << 20


def digest(image: Any) -> str:
    """Return the digest of the size, and of every object that exists and is not zero."""
    state = hashlib.sha256(str(image.size()).encode())
    objects: list[tuple[int, int]] = []

    def add(offset: int, length: int, exists: bool) -> None:  # noqa: FBT001  # librbd calls it so
        if exists:
            objects.append((offset, length))

    image.diff_iterate(0, image.size(), None, add, include_parent=True, whole_object=True)
    for start, length in objects:
        for offset in range(start, start + length, BLOCK):
            data = image.read(offset, min(BLOCK, start + length - offset))
            if any(data):
                state.update(offset.to_bytes(8, "little") + data)
    return state.hexdigest()


def main() -> None:
    """Print the digest of the snapshot named on the command line."""
    import rados
    import rbd

    spec, snapshot = sys.argv[1].split("@")
    pool, name = spec.split("/")
    with (
        rados.Rados(conffile=os.environ["CEPH_CONF"], rados_id="siphon") as cluster,
        cluster.open_ioctx(pool) as ioctx,
        rbd.Image(ioctx, name, snapshot=snapshot, read_only=True) as image,
    ):
        print(digest(image))


if __name__ == "__main__":
    main()
