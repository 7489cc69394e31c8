"""`rbd-siphon config` as people use it: begin, check, and be told everything that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support import Pair, command, ours, unique

GOOD = """
[source]
id = "siphon"

[target.dr]
host = "dr-site"
id = "siphon"
conf = "{conf}"

[[job]]
name = "vms"
source = "vms"
target = "dr"
pool = "vms-dr"
include = ["{image}"]
every = "15m"
objective = "30m"
"""


@pytest.fixture
def good(pair: Pair, tmp_path: Path) -> Path:
    file = tmp_path / "siphon.toml"
    file.write_text(GOOD.format(conf=pair.lab.target.conf, image=pair.new("configured", size=4 << 20, fill_with=None)))
    return file


def test_an_example_is_written_once_and_can_be_checked_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "siphon.toml"
    ours("config", "init", str(file))
    assert "1 job(s), 1 target(s)" in ours("config", "check", "--offline", str(file))
    assert json.loads(ours("config", "show", "--json", str(file)))["job"][0]["every"] == 900
    assert 'job[1].source = "vms"' in ours("config", "show", str(file)).splitlines()
    again = command("config", "init", str(file))
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_what_a_configuration_names_is_tried(good: Path) -> None:
    told = ours("config", "check", str(good))
    assert "FAILED" not in told
    assert told.count("  ok ") == 4
    assert "1 image(s) match" in told


@pytest.mark.parametrize("worker", ["siphon", "rbd"])
def test_every_trouble_is_told_not_only_the_first(pair: Pair, good: Path, worker: str) -> None:
    text = good.read_text().replace('pool = "vms-dr"', 'pool = "nowhere"').replace('source = "vms"', 'source = "lost"')
    good.write_text(text.replace("[[job]]", f'worker = "{worker}"\n[[job]]'))
    done = command("config", "check", str(good))
    assert done.returncode == 2, "what is told at last is the first trouble"
    assert done.stdout.count("FAILED") == 2
    assert "there is no pool 'lost'" in done.stderr
    assert "and 1 more" in done.stderr
    assert "nowhere" in done.stdout


def test_a_host_that_is_not_there_and_a_selector_that_matches_nothing_are_seen(good: Path) -> None:
    good.write_text(good.read_text().replace('"dr-site"', '"nowhere.invalid"').replace("configured", "misspelt"))
    done = command("config", "check", str(good))
    assert done.returncode == 4
    assert "warning" in done.stdout
    assert "no image matches" in done.stdout


@pytest.mark.parametrize("worker", ["siphon", "rbd"])
def test_a_user_who_may_only_read_is_found_out(pair: Pair, good: Path, worker: str) -> None:
    keyring = good.with_name("keyring")
    keyring.write_text(
        pair.lab.target.ceph("auth", "get-or-create", "client.reader", "mon", "profile rbd", "osd", "profile rbd-read-only")
    )
    words = f'id = "reader"\nworker = "{worker}"\nkeyring = "{keyring}"\nconf'
    good.write_text(good.read_text().replace('id = "siphon"\nconf', words))
    done = command("config", "check", str(good))
    assert done.returncode == 4, done.stdout
    assert re.findall("FAILED (.*)", done.stdout)[0].strip().startswith(('job "vms": target dr', "target dr"))


def test_a_file_that_is_wrong_or_not_there_gets_one_line_and_a_hint(good: Path) -> None:
    good.write_text(good.read_text().replace("every", "evry"))
    done = command("config", "check", str(good))
    assert done.returncode == 2
    assert 'job "vms".evry is not known; known here: name, source' in done.stderr
    gone = command("config", "show", f"{unique('nothing')}.toml")
    assert gone.returncode == 2
    assert "config init" in gone.stderr
