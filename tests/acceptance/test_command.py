"""The installed command as people and scripts use it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import rbd

from support import MIB, SIPHON, Pair, command, fill, json_lines, unique, worker_pids


def sync(pair: Pair, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return command("sync", f"vms/{name}", pair.place(name), *words)


def test_json_is_one_object_a_line_and_ends_with_the_result(pair: Pair) -> None:
    name = pair.new("json")
    done = sync(pair, name, "--json")
    lines = json_lines(done.stdout)
    assert done.returncode == 0
    assert done.stderr == ""
    assert {each["type"] for each in lines} == {"plan", "progress", "result"}
    result = lines[-1]
    assert result["type"] == "result"
    assert result["state"] == "committed"
    assert set(result) >= {"image", "base", "end", "bytes_read", "bytes_sent", "resumed_from", "attempts", "seconds"}
    assert result["bytes_sent"] > 0
    assert result["base"] is None
    assert result["resumed_from"] is None
    assert pair.same(name) == [result["end"]]


def test_json_ends_with_the_error(pair: Pair) -> None:
    done = command("sync", "vms/absent", "dr-site:vms-dr", "--json")
    last = json_lines(done.stdout)[-1]
    assert (done.returncode, last["type"], last["code"]) == (2, "error", 2)
    assert "absent" in last["message"]
    assert done.stderr == ""


def test_people_get_the_result_on_stdout_and_the_rest_on_stderr(pair: Pair) -> None:
    name = pair.new("people")
    done = sync(pair, name)
    assert done.stdout.count("\n") == 1
    assert "committed siphon-" in done.stdout
    assert "(nothing) → siphon-" in done.stderr
    again = sync(pair, name, "--quiet")
    assert (again.stdout, again.stderr) == ("", "")
    verbose = sync(pair, name, "--verbose")
    assert "ssh dr-site rbd-siphon worker" in verbose.stderr
    assert "rbd snap create" in verbose.stderr


def test_a_dry_run_prints_the_plan(pair: Pair) -> None:
    name = pair.new("plan")
    done = sync(pair, name, "--dry-run")
    assert done.returncode == 0
    assert "would take 1 step(s)" in done.stdout
    assert f"creates  target: image vms-dr/{name}" in done.stdout
    assert name not in pair.target.names()


def test_a_reader_that_has_had_enough_does_not_break_the_run(pair: Pair) -> None:
    name = pair.new("head")
    line = f"{SIPHON} sync vms/{name} {pair.place(name)} --json | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert len(pair.same(name)) == 1


def test_the_help_lists_the_exit_codes() -> None:
    for words in (("--help",), ("sync", "--help")):
        text = " ".join(command(*words).stdout.split())
        assert "3 conflict, refused to write" in text
        assert "7 behind its objective" in text
    assert command("--version").stdout.startswith("rbd-siphon ")


BAD = [
    (["--conf", "/nonexistent/ceph.conf"], 2, "/nonexistent/ceph.conf"),
    (["--id", "nobody"], 4, "refused client.nobody"),
    (["--keyring", "/nonexistent"], 2, "no key for client.siphon"),
    (["--id", "reader"], 4, "permission denied"),
    (["--target-conf", "/nonexistent/ceph.conf"], 2, "at the target"),
    (["--target-id", "nobody"], 4, "at the target"),
    (["--target-id", "reader"], 4, "permission denied"),
    (["--ssh-port", "1", "--attempts", "2"], 4, "cannot be reached"),
    (["--identity", "/nonexistent"], 2, "cannot be read"),
    (["--identity", "{wrong_key}"], 4, "refused our keys"),
    (["--known-hosts", "/dev/null"], 4, "host key of dr-site is not known"),
    (["--worker-command", "/nonexistent/rbd-siphon worker"], 4, "there is no rbd-siphon at the target"),
    (["--worker-command", "echo 'rbd-siphon wire=99 version=9.9'; cat >/dev/null #"], 4, "9.9 at the target speaks 99"),
    (["--worker-command", "exit 3 #"], 4, "status 3"),
    (["--worker-command", "yes #"], 4, "does not speak our protocol"),
    (["--rollback", "--recreate"], 2, "exclude each other"),
    (["--keep", "0"], 2, "--keep"),
]


@pytest.mark.parametrize(("words", "code", "said"), BAD, ids=[" ".join(each[0])[:40] for each in BAD])
def test_bad_input_gets_one_clear_line_and_a_hint(
    pair: Pair, tmp_path_factory: pytest.TempPathFactory, words: list[str], code: int, said: str
) -> None:
    name = pair.new("bad")
    wrong = tmp_path_factory.mktemp("keys") / "wrong"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(wrong)], check=True)
    done = sync(pair, name, *[word.format(wrong_key=wrong) if word.startswith("{") else word for word in words])
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert pair.source.snapshots(name) == []
    assert name not in pair.target.names()


SPECS = [
    (["vms/a/b/", "dr-site:vms-dr"], 2, "names a pool"),
    (["vms/x@", "dr-site:vms-dr"], 2, "without a snapshot's name"),
    (["vms/x", "dr-site"], 2, "is not a target"),
    (["no-such-pool/x", "dr-site:vms-dr"], 2, "there is no pool 'no-such-pool'"),
    (["vms/no-such-space/x", "dr-site:vms-dr"], 2, "there is no namespace"),
    (["vms/no-such-image", "dr-site:vms-dr"], 2, "there is no image vms/no-such-image"),
    (["vms/{name}@no-such-snap", "dr-site:vms-dr"], 2, "there is no snapshot"),
    (["vms/{name}", "dr-site:no-such-pool/x"], 3, "there is no pool"),
    (["vms/{name}", "dr-site:vms-dr/no-such-space/x"], 3, "there is no namespace"),
    (["vms/{name}", "no-such-host.invalid:vms-dr"], 4, "no-such-host.invalid"),
]


@pytest.mark.parametrize(("words", "code", "said"), SPECS, ids=[" ".join(each[0]) for each in SPECS])
def test_a_place_that_is_not_there_is_named(pair: Pair, words: list[str], code: int, said: str) -> None:
    name = pair.new("places")
    done = command("sync", *[word.format(name=name) for word in words], "--attempts", "1")
    assert done.returncode == code, done.stderr
    assert (said in done.stderr and "→" in done.stderr) or code == 2
    assert "Traceback" not in done.stderr


def test_a_pool_ends_with_a_summary_and_choosing_needs_a_pool(pair: Pair) -> None:
    name = pair.new("pooled")
    done = command("sync", "vms/", "dr-site:vms-dr", "--include", name, "--exclude", "nothing-*", "--json")
    assert done.returncode == 0, done.stderr
    *_, result, summary = json_lines(done.stdout)
    assert (result["type"], result["image"], result["state"]) == ("result", f"vms/{name}", "committed")
    assert (summary["type"], summary["images"], summary["committed"], summary["code"]) == ("summary", 1, 1, 0)
    again = command("sync", "vms/", "dr-site:vms-dr", "--include", name)
    assert again.stdout.splitlines()[-1].startswith("1 image(s): ")
    pair.same(name)
    for words, said in (
        ([f"vms/{name}", "dr-site:vms-dr", "--include", "a*"], "choose among a pool's images"),
        (["vms/", "dr-site:vms-dr", "--include", "no-such-*"], "no image of vms matches"),
        ([f"vms/{name}", "dr-site:vms-dr", "--lanes", "99"], "there cannot be '99' lanes"),
        ([f"vms/{name}", "dr-site:vms-dr", "--compress", "gzip"], "there is no compression"),
        ([f"vms/{name}", "dr-site:vms-dr", "--bwlimit", "fast"], "is no limit"),
        ([f"vms/{name}", "dr-site:vms-dr", "--worker", "rbd", "--lanes", "4"], "one uncompressed stream"),
    ):
        wrong = command("sync", *words)
        assert wrong.returncode == 2, wrong.stderr
        assert said in wrong.stderr


def test_the_line_that_pins_a_host_key_pins_it(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = pair.new("pin")
    known = tmp_path_factory.mktemp("home") / "known_hosts"
    known.touch()
    refused = sync(pair, name, "--known-hosts", str(known))
    line = refused.stderr.split("echo '")[1].split("' >>")[0]
    known.write_text(line + "\n")
    assert sync(pair, name, "--known-hosts", str(known)).returncode == 0
    pair.same(name)


def test_keys_of_the_ssh_agent_work(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = pair.new("agent")
    folder = tmp_path_factory.mktemp("agent")
    config = folder / "config"
    lines = pair.lab.ssh.client_config.read_text().splitlines()
    config.write_text("\n".join(each for each in lines if "Identit" not in each) + "\n")
    started = subprocess.run(["ssh-agent", "-c", "-a", str(folder / "sock")], capture_output=True, text=True, check=True)
    pid = int(started.stdout.split("SSH_AGENT_PID ")[1].split(";")[0])
    env = {"SSH_AUTH_SOCK": str(folder / "sock"), "RBD_SIPHON_SSH_CONFIG": str(config), "HOME": str(folder)}
    try:
        without = command("sync", f"vms/{name}", pair.place(name), env=env)
        assert without.returncode == 4
        subprocess.run(["ssh-add", "-q", str(pair.lab.ssh.home / "user_key")], env={**os.environ, **env}, check=True)
        done = command("sync", f"vms/{name}", pair.place(name), env=env)
    finally:
        os.kill(pid, signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    pair.same(name)


def test_a_chatty_shell_profile_is_skipped_with_a_warning(pair: Pair) -> None:
    name = pair.new("chatty")
    done = sync(pair, name, "--worker-command", "echo 'Welcome to the DR site!'; rbd-siphon worker")
    assert done.returncode == 0
    assert "Welcome to the DR site!" in done.stderr
    pair.same(name)


def test_a_full_pool_is_told_at_once(pair: Pair) -> None:
    pool = unique("full")
    target = pair.lab.target
    target.pool(pool)
    pair.target.ioctx(pool).write_full("filler", bytes(2 * MIB))
    target.ceph("osd", "pool", "set-quota", pool, "max_bytes", str(MIB))
    deadline = time.monotonic() + 30
    while "full" not in target.ceph("osd", "pool", "get", pool, "all") and "full_quota" not in target.ceph(
        "osd", "pool", "ls", "detail"
    ):
        assert time.monotonic() < deadline, "the quota never took effect"
        time.sleep(0.5)
    name = pair.new("to-full")
    done = command("sync", f"vms/{name}", f"dr-site:{pool}")
    assert done.returncode == 4, done.stderr
    assert "is full" in done.stderr
    assert pair.source.snapshots(name) == []
    target.ceph("osd", "pool", "delete", pool, pool, "--yes-i-really-really-mean-it")


def big(pair: Pair, stem: str) -> str:
    name = pair.new(stem, fill_with=None, size=96 * MIB)
    with pair.source.image(name) as image:
        for at in range(0, 96, 8):
            image.write(random.Random(at).randbytes(8 * MIB), at * MIB)
    return name


def started(pair: Pair, name: str, *words: str) -> subprocess.Popen[str]:
    """Start a sync that takes a while and return once it is in the middle of its step."""
    running = subprocess.Popen(
        [SIPHON, "sync", f"vms/{name}", pair.place(name), "--json", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    for line in running.stdout:
        if '"progress"' in line and '"sent":' in line and int(line.split('"sent":')[1].split(",")[0]) > 4 * MIB:
            break
    return running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_same_command_goes_on(pair: Pair, number: signal.Signals) -> None:
    name = big(pair, "signal")
    running = started(pair, name)
    began = time.monotonic()
    running.send_signal(number)
    out, err = running.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert running.returncode == 128 + number
    assert "Traceback" not in err
    assert json_lines(out)[-1]["type"] == "error"
    again = json_lines(sync(pair, name, "--json").stdout)[-1]
    assert again["state"] == "committed"
    pair.same(name)


@pytest.mark.parametrize("seed", range(4))
def test_a_controller_killed_at_a_random_moment_leaves_nothing_that_hinders(pair: Pair, seed: int) -> None:
    name = big(pair, "killed")
    chance = random.Random(seed)
    for _ in range(3):
        running = subprocess.Popen([SIPHON, "sync", f"vms/{name}", pair.place(name), "--quiet"])
        time.sleep(chance.uniform(0.2, 1.6))
        running.kill()
        running.wait()
    deadline = time.monotonic() + 10
    while worker_pids():
        assert time.monotonic() < deadline, "a worker outlives its controller"
        time.sleep(0.05)
    if name in pair.target.names():
        assert pair.target.lock_owner(name) == ""
    done = sync(pair, name, "--json", "--keep", "9")
    assert done.returncode == 0, done.stderr
    pair.same(name)


def test_a_controller_killed_in_mid_step_leaves_nothing_that_hinders_the_stock_tools(pair: Pair) -> None:
    name = big(pair, "killed-stock")
    for pause in (1.5, 3.0):
        running = subprocess.Popen([SIPHON, "sync", f"vms/{name}", pair.place(name), "--quiet", "--worker", "rbd"])
        time.sleep(pause)
        running.kill()
        running.wait()
    done = sync(pair, name, "--json", "--keep", "9", "--worker", "rbd")
    assert done.returncode == 0, done.stderr
    pair.same(name)


def test_the_worker_works_as_a_forced_command_and_runs_nothing_else(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = pair.new("forced")
    proof = tmp_path_factory.mktemp("forced") / "ran"
    keys = pair.lab.ssh.authorized_keys
    saved = keys.read_text()
    keys.write_text(f'command="{SIPHON} worker",restrict {saved}')
    try:
        done = sync(pair, name, "--worker-command", f"touch {proof}; rbd-siphon worker")
    finally:
        keys.write_text(saved)
    assert done.returncode == 0, done.stderr
    assert not proof.exists()
    pair.same(name)


def test_a_worker_started_by_hand_says_what_it_is() -> None:
    import pty

    master, slave = pty.openpty()
    done = subprocess.run([SIPHON, "worker"], stdin=slave, capture_output=True, text=True, timeout=20, check=False)
    os.close(master)
    os.close(slave)
    assert done.returncode == 2
    assert "far end of the wire" in done.stderr


def test_increments_go_on_as_the_least_privileged_user(pair: Pair) -> None:
    name = pair.new("caps")
    for seed in range(3):
        fill(pair.source, name, seed, spans=1)
        done = sync(pair, name, "--keep", "1", "--id", "siphon", "--target-id", "siphon")
        assert done.returncode == 0, done.stderr
    assert len(pair.same(name)) == 1
    assert len(pair.source.snapshots(name)) == 1


def test_an_image_that_somebody_else_locked_is_exit_code_5_with_who(pair: Pair) -> None:
    name = pair.new("held")
    assert sync(pair, name).returncode == 0
    fill(pair.source, name, 2)
    with pair.target.image(name) as image:
        image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
        done = sync(pair, name)
        assert done.returncode == 5, done.stderr
        assert pair.target.address in done.stderr
    assert sync(pair, name).returncode == 0
    pair.same(name)


#: Passes standard input on to a command, with one bit of it turned over at an offset.
TAMPER = """
import subprocess, sys
at, seen = int(sys.argv[1]), 0
far = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE)
while data := bytearray(sys.stdin.buffer.raw.read(65536)):
    if seen <= at < seen + len(data):
        data[at - seen] ^= 1
    seen += len(data)
    far.stdin.write(data)
    far.stdin.flush()
far.stdin.close()
far.wait()
"""


def test_data_that_arrives_changed_is_exit_code_6_and_nothing_is_committed(
    pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = pair.new("tampered")
    script = tmp_path_factory.mktemp("tamper") / "tamper.py"
    script.write_text(TAMPER)
    worker = f"{sys.executable} {script} {3 * MIB} rbd-siphon worker"
    done = sync(pair, name, "--worker-command", worker, "--attempts", "1")
    assert done.returncode == 6, done.stderr
    assert "arrived damaged" in done.stderr
    assert pair.target.snapshots(name) == []
    assert sync(pair, name).returncode == 0
    pair.same(name)


def test_a_terminal_shows_step_amount_rate_and_time_left(pair: Pair) -> None:
    name = big(pair, "terminal")

    async def go() -> bytes:
        async with pair.relay(rate=24e6) as (_, config):
            return await asyncio.to_thread(on_terminal, pair, name, str(config))

    shown = asyncio.run(go()).decode()
    assert re.search(r"step 1 of 1 · [\d.]+ MiB of 96\.0 MiB · [\d.]+ MiB/s · ETA [\d.]+ s · \(nothing\) → siphon-", shown), shown
    pair.same(name)


def on_terminal(pair: Pair, name: str, config: str) -> bytes:
    """Run a sync whose standard error is a terminal, and return what that showed."""
    import pty

    master, slave = pty.openpty()
    words = [SIPHON, "sync", f"vms/{name}", pair.place(name), "--ssh-config", config]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=slave, env=env)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while data := os.read(master, 65536):
            shown += data
    os.close(master)
    assert running.wait() == 0, shown
    return shown


def test_attempt_and_trouble_are_told_unless_quiet(pair: Pair) -> None:
    name = big(pair, "retry")

    async def go(*words: str) -> subprocess.CompletedProcess[str]:
        async with pair.relay(cut_after=20 * MIB, rate=30e6) as (_, config):
            return await asyncio.to_thread(sync, pair, name, "--ssh-config", str(config), *words)

    told = asyncio.run(go())
    assert told.returncode == 0, told.stderr
    assert "attempt 1 failed: the connection to the target site broke" in told.stderr
    assert "2 attempts" in told.stdout
    with pair.source.image(name) as image:
        image.write(random.Random(7).randbytes(40 * MIB), 0)
    quiet = asyncio.run(go("--quiet"))
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    pair.same(name)


def test_a_pool_that_fills_up_in_mid_step_is_told_and_the_step_goes_on_once_there_is_room(pair: Pair) -> None:
    pool, target = unique("fills"), pair.lab.target
    target.pool(pool)
    target.ceph("osd", "pool", "set-quota", pool, "max_bytes", str(8 * MIB))
    name = big(pair, "filling")

    async def go() -> subprocess.CompletedProcess[str]:
        async with pair.relay(rate=8e6) as (_, config):
            words = ("sync", f"vms/{name}", f"dr-site:{pool}", "--ssh-config", str(config), "--timeout", "5")
            return await asyncio.to_thread(command, *words)

    full = asyncio.run(go())
    assert full.returncode == 4, full.stderr
    assert "1 pool(s) full" in full.stderr
    assert f"the target's pool '{pool}' is full" in full.stderr
    target.ceph("osd", "pool", "set-quota", pool, "max_bytes", "0")
    deadline = time.monotonic() + 30
    while "full_quota" in target.ceph("osd", "pool", "ls", "detail"):
        assert time.monotonic() < deadline, "the quota is still in force"
        time.sleep(0.2)
    result = json_lines(command("sync", f"vms/{name}", f"dr-site:{pool}", "--json").stdout)[-1]
    assert result["state"] == "committed"
    assert result["resumed_from"] > 0
    end = result["end"]
    assert pair.target.digest(name, end, pool=pool) == pair.source.digest(name, end)
    target.ceph("osd", "pool", "delete", pool, pool, "--yes-i-really-really-mean-it")
