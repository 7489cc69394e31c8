"""A configuration is read as a whole, and what is wrong in it is named by file, key and what is allowed."""

from __future__ import annotations

import json
import re

import pytest

from agent.config import EXAMPLE, Job, Span, parse_config, shown
from agent.errors import UsageError
from agent.retention import Keep

GOOD = """
[source]
id = "siphon"

[target.dr]
host = "dr-site"
user = "root"
id = "siphon"
bwlimit = "08:00-18:00 50M, else 0"

[[job]]
name = "vms"
source = "vms"
target = "dr"
pool = "vms-dr"
exclude = ["scratch-*"]
every = "15m"
jitter = "30s"
objective = "30m"
keep = { last = 3, hourly = 24, daily = 7 }
on_deleted = "trash-after 30d"

[[job]]
name = "databases"
source = "db/blue"
target = "dr"
cron = "0 2 * * mon-fri"
timezone = "Europe/Berlin"
objective = "26h"
hooks = { freeze = "freeze.sh", thaw = "thaw.sh", timeout = "10s" }

[agent]
listen = "127.0.0.1:9280"
"""


def test_a_whole_configuration_is_read() -> None:
    config = parse_config(GOOD, "siphon.toml")
    vms, databases = config.job
    assert [vms.every, vms.jitter, vms.objective, vms.trash_after] == [900, 30, 1800, 30 * 86400]
    assert vms.keep == Keep(last=3, hourly=24, daily=7)
    assert databases.every is None
    assert databases.cron == "0 2 * * mon-fri"
    assert databases.hooks.timeout == Span(10)
    assert databases.trash_after is None
    assert config.target["dr"].parallel == 4


def test_what_is_in_force_can_be_shown_as_json() -> None:
    told = json.loads(json.dumps(shown(parse_config(GOOD, "siphon.toml"))))
    assert told["job"][0]["every"] == 900
    assert told["target"]["dr"]["worker_command"] == "rbd-siphon worker"
    assert told["agent"]["lease"] == 30


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[source]", "[sauce]", "sauce is not known; known here: source, target, job, agent"),
        ('id = "siphon"\n\n', 'user = "siphon"\n\n', "source.user is not known; known here: conf, cluster, id, keyring"),
        ('host = "dr-site"', 'hots = "dr-site"', "target.dr.hots is not known"),
        ('host = "dr-site"\n', "", "target.dr: Object missing required field `host`"),
        ('host = "dr-site"', 'host = "root@dr-site"', "target.dr.host: 'root@dr-site' is no host"),
        ("else 0", "else fast", "target.dr.bwlimit: '08:00-18:00 50M, else fast' is no limit"),
        ('else 0"', 'else 0"\nlanes = 99', "target.dr.lanes: "),
        ('else 0"', 'else 0"\ncompress = "gzip"', "target.dr.compress: there is no compression 'gzip'"),
        ('else 0"', 'else 0"\nparallel = 0', "target.dr.parallel: 0 is not between 1 and 64"),
        ('else 0"', 'else 0"\nworker = "rbd"\nchecksum_skip = true', "target.dr.checksum_skip: "),
        ('else 0"', 'else 0"\nworker = "nbd"', "target.dr.worker: Invalid enum value 'nbd'"),
        ('every = "15m"', 'every = "15"', "job \"vms\".every: '15' is no length of time"),
        ('every = "15m"', "every = 15", 'job "vms".every: 15 is no length of time: a number and s, m, h or d'),
        ('every = "15m"', 'every = "15m"\ncron = "* * * * *"', 'job "vms".every: a job runs by one of the two'),
        ('every = "15m"\n', "", 'job "vms".every: a job runs by one of the two'),
        ('objective = "30m"', 'objective = "10m"', 'job "vms".objective: it is shorter than `every`'),
        ('jitter = "30s"', 'jitter = "20m"', 'job "vms".jitter: it must be shorter'),
        ("hourly = 24", "hurly = 24", 'job "vms".keep.hurly is not known; known here: last, hourly, daily, weekly, monthly'),
        ("last = 3", "last = 0", 'job "vms".keep: `last` is at least 1'),
        ("hourly = 24", 'hourly = "24"', 'job "vms".keep.hourly: Expected `int`, got `str`'),
        ("trash-after 30d", "trash", "job \"vms\".on_deleted: 'trash' is neither"),
        ("0 2 * * mon-fri", "0 25 * * *", "job \"databases\".cron: '0 25 * * *' is no schedule"),
        ("Europe/Berlin", "Europe/Bonn", "job \"databases\".timezone: 'Europe/Bonn' is no time zone"),
        (', thaw = "thaw.sh"', "", 'job "databases".hooks.thaw: what freezes must be thawed'),
        ("10s", "1h", 'job "databases".hooks.timeout: 3600 is not between 1 and 600'),
        ('source = "db/blue"', 'source = "db/blue/image"', "job \"databases\".source: 'db/blue/image' is neither POOL"),
        ('name = "databases"', 'name = "vms"', 'job "vms".name: two jobs have this name'),
        ('name = "databases"', 'name = ""', "job 2.name: '' is no name"),
        ('source = "db/blue"', 'source = "db"\npool = "vms-dr"', 'job "databases".pool: job "vms" puts images of another pool'),
        ('target = "dr"\ncron', 'target = "rd"\ncron', "job \"databases\".target: there is no target 'rd'; there are: dr"),
        ("127.0.0.1:9280", "0.0.0.0:9280", "agent.token_file: 0.0.0.0:9280 can be reached from elsewhere"),
        ("127.0.0.1:9280", "9280", "agent.listen: '9280' is no address and port"),
        ('id = "siphon"\n\n', "id = siphon\n\n", "siphon.toml is no TOML: "),
        ("[[job]]", "[job]", "siphon.toml is no TOML: "),
    ],
)
def test_what_is_wrong_is_named_with_its_key_and_what_is_allowed(old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(UsageError) as wrong:
        parse_config(GOOD.replace(old, new, 1), "siphon.toml")
    assert said in str(wrong.value)
    assert str(wrong.value).startswith("siphon.toml")


@pytest.mark.parametrize("host", ["10.0.0.7", "[2001:db8::1]", "2001:db8::1", "dr-site.example.org"])
def test_a_host_may_be_a_name_or_an_address(host: str) -> None:
    assert parse_config(GOOD.replace('"dr-site"', f'"{host}"'), "siphon.toml").target["dr"].host == host


def test_what_is_in_force_names_every_kind_of_period() -> None:
    told = shown(parse_config(GOOD, "siphon.toml"))["job"][0]["keep"]
    assert told == {"last": 3, "hourly": 24, "daily": 7, "weekly": 0, "monthly": 0}


def test_the_example_is_right_and_so_is_each_line_that_it_comments_out() -> None:
    assert parse_config(EXAMPLE, "example.toml").job[0].keep.hourly == 24
    for number, line in enumerate(EXAMPLE.splitlines()):
        if re.match(r"# \w+ = ", line):
            lines = EXAMPLE.splitlines()
            lines[number] = line.removeprefix("# ")
            parse_config("\n".join(lines), f"example.toml with {line}")


def test_every_key_of_a_job_is_shown_by_the_example() -> None:
    shown_there = set(re.findall(r"^(?:# )?(\w+) = ", EXAMPLE, re.MULTILINE))
    assert set(Job.__struct_fields__) - shown_there <= {"cron", "timezone", "intermediate", "data_pool"}


def test_a_file_without_a_job_is_refused() -> None:
    with pytest.raises(UsageError, match="job: there is none"):
        parse_config('[target.dr]\nhost = "dr-site"\n', "siphon.toml")
