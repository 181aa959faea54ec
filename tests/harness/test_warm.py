"""Servers forked from a warm process: each finds what a new process finds, and ends as a started one does."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.server import warm
from harness.server.launch import FORK_START, Launch
from harness.server.log import read_log
from harness.server.process import Server
from harness.suite import ROOT

TOLD = """
import atexit, json, os, signal, sys, tempfile
import colorsys
print(json.dumps({
    "argv": sys.argv, "name": __name__, "own": dict(os.environ), "stdin": sys.stdin.read(),
    "scratch": tempfile.gettempdir(),
    "preloaded": hasattr(colorsys, "MARK"), "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "open": sorted(int(name) for name in os.listdir("/proc/self/fd")),
}))
colorsys.MARK = True
open(os.path.join(tempfile.gettempdir(), "left"), "w").close()
atexit.register(print, "goodbye")
sys.exit(int(os.environ.get("STATUS", 0)))
"""
SLEEPS = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"
NOBODY = threading.Event()


@pytest.fixture
def env(tmp_path):
    (tmp_path / "told_program.py").write_text(TOLD)
    (tmp_path / "sleeping_program.py").write_text(SLEEPS)
    (tmp_path / "broken_program.py").write_text("raise ValueError('on purpose')\n")
    (tmp_path / "refusing_program.py").write_text("import sys\nsys.exit('in one line')\n")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "KEEP": "same"}


@pytest.fixture
def starter(env):
    made = warm.Starter(env, ["colorsys"])
    assert made.ready(NOBODY)
    yield made
    made.close()


@pytest.fixture
def run(starter, env, tmp_path):
    """run(program, arguments, variables) -> (guard, log)."""
    logs = []

    def start(program, *arguments, lease=None, grace=5.0, **variables):
        log = tmp_path / f"{len(logs)}.log"
        logs.append(log)
        with log.open("wb") as file:
            guard = starter.start([program, *arguments], env | variables, grace, file.fileno(), lease)
        return guard, log

    return start


def until(holds, seconds=20):
    end = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def test_a_server_finds_what_a_new_process_finds(run, env, tmp_path):
    guard, log = run("told_program", "--port", "1", "a b", STATUS="7", VLLM_API_KEY="its own")
    assert guard.wait(30) == 7 and guard.poll() == 7
    said, farewell = log.read_text().splitlines()
    told = json.loads(said)
    assert told["argv"] == [str(tmp_path / "told_program.py"), "--port", "1", "a b"] and told["name"] == "__main__"
    own = told["own"]
    assert {name: own.pop(name) for name in ("VLLM_WORKER_MULTIPROC_METHOD", "STATUS", "VLLM_API_KEY")} == {
        "VLLM_WORKER_MULTIPROC_METHOD": "fork", "STATUS": "7", "VLLM_API_KEY": "its own",
    }  # fmt: skip
    assert own.pop("TMPDIR") == told["scratch"] and not Path(told["scratch"]).exists()
    env.pop("TMPDIR", None), env.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    assert own == env
    assert told["stdin"] == "" and told["term"]
    assert told["open"] == [0, 1, 2, 3]  # 3 is the listing itself: nothing of guard or harness is held
    assert farewell == "goodbye"


def test_no_server_sees_what_another_did(run):
    for _ in range(2):
        guard, log = run("told_program")
        assert guard.wait(30) == 0
        assert json.loads(log.read_text().splitlines()[0])["preloaded"] is False


def test_ends_are_told_as_python_tells_them(run):
    broken, log = run("broken_program")
    assert broken.wait(30) == 1 and "ValueError: on purpose" in log.read_text()
    refusing, log = run("refusing_program")
    assert refusing.wait(30) == 1 and log.read_text() == "in one line\n"
    missing, log = run("no_such_program")
    assert missing.wait(30) == 1 and "no_such_program" in log.read_text()


def test_stop_kill_and_the_death_of_a_guard(run):
    stopped, log = run("sleeping_program")
    assert until(lambda: "up" in log.read_text())
    assert stopped.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        stopped.wait(0.05)
    stopped.stdin.write(b"stop\n")
    assert stopped.wait(30) == 128 + signal.SIGTERM
    killed, log = run("sleeping_program")
    assert until(lambda: "up" in log.read_text())
    (server,) = psutil.Process(killed.pid).children()
    killed.kill()
    assert killed.wait(30) == -signal.SIGKILL == killed.returncode
    assert until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)


def test_a_guard_holds_the_lease_and_its_server_does_not(run, tmp_path):
    with (tmp_path / "lease").open("w") as lease:
        fcntl.flock(lease, fcntl.LOCK_EX)
        guard, log = run("sleeping_program", lease=lease.fileno())
    assert until(lambda: "up" in log.read_text())
    (server,) = psutil.Process(guard.pid).children()
    holds = {pid: str(tmp_path / "lease") in links(pid) for pid in (guard.pid, server.pid)}
    assert holds == {guard.pid: True, server.pid: False}
    guard.stdin.close()  # as when the harness dies
    guard.wait(30)
    with (tmp_path / "lease").open() as lease:
        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)


def links(pid: int) -> list[str]:
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(os.readlink(entry.path))
    return found


def test_a_warm_process_that_died_is_done_without(starter, env, tmp_path):
    starter._process.kill()
    starter._process.wait()
    with (tmp_path / "log").open("wb") as log:
        assert starter.start(["told_program"], env, 5.0, log.fileno(), None) is None
    assert not warm.Starter(env, ["no_such_module"]).ready(NOBODY)


def test_waiting_for_imports_can_be_cancelled(env, tmp_path):
    (tmp_path / "slow_import.py").write_text(SLEEPS)
    cancel = threading.Event()
    made = warm.Starter(env, ["slow_import"])
    cancel.set()
    assert not made.ready(cancel)
    made._process.kill()
    made.close()


HOST = """
import sys, threading, time
from harness.server import warm
starter = warm.Starter(dict({env!r}), ["colorsys"])
starter.ready(threading.Event())
with open(sys.argv[1], "wb") as log:
    guard = starter.start(["sleeping_program"], {env!r}, 5.0, log.fileno(), None)
print(starter._process.pid, guard.pid, flush=True)
time.sleep(600)
"""


def test_nothing_outlives_a_harness_that_is_killed(env, tmp_path):
    host = subprocess.Popen(
        [sys.executable, "-c", HOST.format(env=env), str(tmp_path / "log")], cwd=ROOT, stdout=subprocess.PIPE
    )
    pids = [int(pid) for pid in host.stdout.readline().split()]
    assert until(lambda: "up" in (tmp_path / "log").read_text())
    tree = [psutil.Process(pid) for pid in pids]
    tree += tree[1].children(recursive=True)
    assert len(tree) == 3
    host.kill()
    host.communicate()
    assert until(lambda: not [process for process in tree if living(process)])


def living(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_servers_share_a_warm_process_only_where_all_that_imports_may_read_is_the_same(monkeypatch):
    made = []

    class Made:
        def __init__(self, env):
            made.append(env)

        def ready(self, cancel):
            return True

        def close(self):
            pass

    monkeypatch.setattr(warm, "Starter", Made)
    monkeypatch.setattr(warm, "_starters", {})
    env = {"A": "1", "VLLM_PLUGINS": "", "VLLM_API_KEY": "x", "TMPDIR": "/t"}
    first = warm.starter(tuple(env.items()), NOBODY)
    assert warm.starter(tuple((env | {"VLLM_API_KEY": "y", "TMPDIR": "/u"}).items()), NOBODY) is first
    assert made == [{"A": "1", "VLLM_PLUGINS": ""}]
    for other in ({"A": "2"}, {"VLLM_PLUGINS": "helix"}, {"TORCHDYNAMO_DISABLE": "1"}):
        assert warm.starter(tuple((env | other).items()), NOBODY) is not first
    for number in range(warm.KEPT):  # the one that was not asked for longest is closed
        warm.starter((("A", str(number + 3)),), NOBODY)
    assert len(warm._starters) == warm.KEPT and first not in warm._starters.values()
    monkeypatch.setenv("HELIX_WARM", "0")
    assert warm.starter(tuple(env.items()), NOBODY) is None


def test_only_forked_servers_of_this_host_are_warm(env, tmp_path):
    launch = Launch(argv=(*FORK_START, "vllm", "-x"), env=(), name="n", api_key="k", port=1, model="m")
    assert launch.forked == ("vllm", "-x")
    assert launch.model_copy(update={"guard": ("harness.server.container",)}).forked == ()
    assert launch.model_copy(update={"argv": ("vllm", "serve")}).forked == ()


def test_a_server_that_ends_at_once_tells_why(env, tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "PRELOAD", ())
    monkeypatch.setattr(warm, "_starters", {})
    launch = Launch(
        argv=(*FORK_START, "refusing_program"), env=tuple(env.items()), name="n", api_key="k", port=1, model="m"
    )
    server = Server(launch, tmp_path / "server.log")
    server.warm_up()
    server._guard = None
    with pytest.raises(Exception, match="in one line"):
        server.start()
    assert isinstance(server._guard, warm.WarmGuard)
    assert "in one line" in read_log(tmp_path / "server.log")
    warm.close_all()
