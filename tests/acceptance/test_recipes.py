"""The README's recipes, run as they are written there."""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path

from support import MIB, Pair, unique

README = Path(__file__).resolve().parents[2] / "README.md"


def recipes() -> list[str]:
    text = README.read_text()
    text = text[text.index("### Recipes") : text.index("## What you can rely on")]
    found = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert len(found) == 3
    return found


def test_the_recipes_of_the_readme_do_what_they_say(pair: Pair, tmp_path: Path) -> None:
    name = unique("recipe")
    pair.source.create(name, 64 * MIB)
    for number, point in enumerate(("mon", "tue", "wed")):
        pair.source.write(name, number * 3 * MIB, random.Random(number).randbytes(2 * MIB))
        pair.source.snap(name, point)
    tools = tmp_path / "bin"
    tools.mkdir()
    ssh = tools / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {pair.lab.ssh.client_config} "$@"\n')
    ssh.chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    for block in recipes():
        script = block.replace("web-1", name).replace("/srv/archive", str(tmp_path / "archive"))
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert pair.same(name, f"{name}-copy") == ["mon", "tue", "wed"]
    pair.target.remove(f"{name}-copy")
    with pair.source.image(name, "wed") as image:
        for raw in ("disk.raw", f"{name}.raw"):
            assert (tmp_path / raw).read_bytes() == image.read(0, image.size())


def test_a_diff_verb_without_standard_output_or_with_a_deaf_one_ends_without_a_traceback(pair: Pair, tmp_path: Path) -> None:
    name = pair.new("deaf")
    pair.source.snap(name, "a")
    file = tmp_path / "a"
    for line, code in (
        (f"rbd-siphon export-diff vms/{name}@a {file} >&-", 0),
        (f"rbd-siphon inspect {file} >/dev/full", 1),
        (f"set -o pipefail; rbd-siphon inspect --extents {file} | false", 1),
        (f"rbd-siphon merge-diff - {file} {tmp_path}/out < {file}", 3),
        (f"rbd-siphon import-diff {tmp_path} vms-dr/{name}", 2),
        (f"rbd-siphon inspect {tmp_path}/{'x' * 300}", 2),
    ):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == code, (line, done.stderr)
        assert "Traceback" not in done.stderr, line
