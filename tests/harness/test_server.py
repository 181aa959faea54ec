"""A server's life, on a stub process: ready, refused, dying, never ready; and that nothing outlives it."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.cell import Cell, Mode
from harness.lease import lease_port
from harness.server.launch import Launch, environment, make_launch
from harness.server.log import Cause, explain, kv_cache_tokens
from harness.server.process import Limits, Server, ServerFailed

STUB = Path(__file__).with_name("stub_server.py")


def launch(behaviour: str, port: int, name: str = "helix-test") -> Launch:
    argv = (sys.executable, str(STUB), behaviour, str(port), name)
    env = tuple({**os.environ, "VLLM_API_KEY": "key"}.items())
    return Launch(argv=argv, env=env, name="helix-test", api_key="key", port=port, model="stub")


@pytest.fixture
def port():
    with lease_port() as leased:
        yield leased


def server(behaviour: str, port: int, folder: Path, start: float = 20.0, stop: float = 0.3) -> Server:
    return Server(launch(behaviour, port), folder / "server.log", Limits(start=start, stop=stop))


def failure_of(made: Server):
    with pytest.raises(ServerFailed) as raised:
        made.start()
    return raised.value.failure


def gone(pid: int, seconds: float = 15.0) -> bool:
    """Whether process `pid` ends within a generous time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def logged(folder: Path, pattern: str) -> str:
    until = time.monotonic() + 15
    while time.monotonic() < until:
        log = folder / "server.log"
        if log.exists() and (found := re.search(pattern, log.read_text())):
            return found[1]
        time.sleep(0.02)
    raise AssertionError(f"{pattern} not logged")


def test_a_server_is_ready_then_gone(port, tmp_path):
    with server("well", port, tmp_path) as running:
        pid = int(logged(tmp_path, r"stub (\d+)"))
        assert running.failure() is None
        assert running.kv_cache_tokens() == 21824
    assert gone(pid)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_a_server_is_asked_without_the_proxy_of_the_environment(port, tmp_path, monkeypatch):
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with server("well", port, tmp_path) as running:
        assert running.failure() is None


def test_a_stubborn_tree_and_its_shared_memory_go(port, tmp_path):
    with server("stubborn", port, tmp_path):
        child = int(logged(tmp_path, r"child (\d+)"))
        shm = Path("/dev/shm") / logged(tmp_path, r"shm (\S+)")
        assert shm.exists() and psutil.pid_exists(child)
    assert gone(child)
    assert not shm.exists()


def test_a_crash_leaves_nothing(port, tmp_path):
    failure = failure_of(server("leaks-and-dies", port, tmp_path))
    assert failure.cause is Cause.OTHER and "exit status 5" in failure.reason
    assert gone(int(logged(tmp_path, r"child (\d+)")))
    assert not (Path("/dev/shm") / logged(tmp_path, r"shm (\S+)")).exists()


def test_another_process_keeps_its_shared_memory(port, tmp_path):
    from multiprocessing import shared_memory

    mine = shared_memory.SharedMemory(create=True, size=4096)
    try:
        with server("well", port, tmp_path):
            younger = shared_memory.SharedMemory(create=True, size=4096)
            lock = multiprocessing.get_context("spawn").Lock()  # nobody maps it under its name
            semaphore = Path("/dev/shm") / f"sem.{lock._semlock.name.strip('/')}"
        assert semaphore.exists()
        assert (Path("/dev/shm") / mine.name).exists()
        assert (Path("/dev/shm") / younger.name).exists()
    finally:
        for block in (mine, younger):
            block.close()
            block.unlink()


def test_the_harness_killed_takes_its_server_with_it(port, tmp_path):
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]);"
        "import test_server as t; from pathlib import Path;"
        "t.server('stubborn', int(sys.argv[2]), Path(sys.argv[3])).start(); print('up', flush=True); time.sleep(600)"
    )
    harness = subprocess.Popen(
        [sys.executable, "-c", script, str(STUB.parent), str(port), str(tmp_path)], stdout=subprocess.PIPE
    )
    assert harness.stdout.readline() == b"up\n"
    pid, child = int(logged(tmp_path, r"stub (\d+)")), int(logged(tmp_path, r"child (\d+)"))
    shm = Path("/dev/shm") / logged(tmp_path, r"shm (\S+)")
    harness.send_signal(signal.SIGKILL)
    harness.wait()
    harness.stdout.close()
    assert gone(pid) and gone(child)
    until = time.monotonic() + 15
    while shm.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not shm.exists()


def test_a_refusal_is_read_as_the_rule(port, tmp_path):
    failure = failure_of(server("refused", port, tmp_path))
    assert failure.cause is Cause.REFUSED
    assert failure.reason == "TP 4 % DCP 3 = 1: not 0"


def test_out_of_memory_is_named(port, tmp_path):
    assert failure_of(server("out-of-memory", port, tmp_path)).cause is Cause.OUT_OF_MEMORY


def test_a_silent_server_meets_its_deadline(port, tmp_path):
    failure = failure_of(server("silent", port, tmp_path, start=4))
    assert failure.cause is Cause.TIMEOUT
    assert gone(int(logged(tmp_path, r"stub (\d+)")))


def test_a_stranger_on_the_port_is_not_ours(port, tmp_path):
    stranger = Server(launch("well", port), tmp_path / "a" / "server.log", Limits(start=20, stop=0.3)).start()
    try:
        other = Server(launch("silent", port).model_copy(update={"name": "helix-other"}), tmp_path / "server.log")
        failure = failure_of(other)
    finally:
        stranger.stop()
    assert failure.cause is Cause.PORT_IN_USE and "another server answers" in failure.reason


def test_a_server_that_asks_no_key_is_not_taken(port, tmp_path):
    assert "without the key HTTP 200" in failure_of(server("open", port, tmp_path)).reason


def test_cancel_ends_a_start(port, tmp_path):
    made = server("silent", port, tmp_path)
    threading.Timer(0.5, made.cancel.set).start()
    assert failure_of(made).cause is Cause.INTERRUPTED
    made.stop(now=True)  # a second stop is harmless


def test_leases_are_exclusive_and_skip_used_ports():
    with lease_port() as first, lease_port() as second:
        assert first != second
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            used = taken.getsockname()[1]
            with pytest.raises(RuntimeError, match="no free port"), lease_port(range(used, used + 1)):
                pass


def test_a_port_is_leased_once_whatever_the_folders(tmp_path, monkeypatch):
    with lease_port() as first:
        monkeypatch.setenv("HELIX_LEASES", str(tmp_path / "other"))
        with lease_port() as second:
            assert first != second


@pytest.mark.parametrize(
    ("text", "status", "cause", "reason"),
    [
        ("LayoutError: TPA 8 > K 4\n", 1, Cause.REFUSED, "TPA 8 > K 4"),
        ("x.HelixRefusal: first\ny.HelixRefusal: last\nRuntimeError: after", 1, Cause.REFUSED, "last"),
        (
            "OSError: [Errno 98] Address already in use",
            1,
            Cause.PORT_IN_USE,
            "OSError: [Errno 98] Address already in use",
        ),
        ("", 137, Cause.KILLED, "SIGKILL (137) from outside, and not for want of memory"),
        (
            "guard: out of memory: the kernel killed x",
            137,
            Cause.OUT_OF_MEMORY,
            "guard: out of memory: the kernel killed x",
        ),
        (
            "CUDA error: an illegal memory access was encountered\nNCCL error: 1",
            1,
            Cause.ILLEGAL_ACCESS,
            "CUDA error: an illegal memory access was encountered",
        ),
        ("RuntimeError: NCCL error: ncclSystemError", 1, Cause.NCCL, "RuntimeError: NCCL error: ncclSystemError"),
        ("", 1, Cause.OTHER, "exit status 1: empty log"),
        (
            "(Worker pid=7) ERROR 11-24 00:26:06 [a.py:1063] ValueError: No common block size for 16\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            1,
            Cause.OTHER,
            "exit status 1: ValueError: No common block size for 16",
        ),
    ],
)
def test_causes_in_logs(text, status, cause, reason):
    failure = explain(text, status)
    assert (failure.cause, failure.reason) == (cause, reason)


#: Two processes write at once: rank 1 stumbles over an assert without a message, rank 0 tells a story of its own.
TORN = """\
(Worker_TP1 pid=8) ERROR 11-24 00:26:06 [m.py:9] Traceback (most recent call last):
(Worker_TP0 pid=7) ERROR 11-24 00:26:06 [m.py:9]   File "/x/site-packages/vllm/other.py", line 5, in ready
(Worker_TP1 pid=8) ERROR 11-24 00:26:06 [m.py:9]   File "/x/site-packages/vllm/model.py", line 12, in __init__
(Worker_TP0 pid=7) ERROR 11-24 00:26:06 [m.py:9]     wait()
(Worker_TP1 pid=8) ERROR 11-24 00:26:06 [m.py:9]     assert heads % tp == 0
(Worker_TP1 pid=8) ERROR 11-24 00:26:06 [m.py:9]            ^^^^^^^^^^^^^^^
(Worker_TP1 pid=8) ERROR 11-24 00:26:06 [m.py:9] AssertionError
"""
WRAPPED = "RuntimeError: Engine core initialization failed. See root cause above.\n"


def test_an_error_that_only_has_a_name_is_told_with_its_place():
    failure = explain(TORN + WRAPPED, 1)
    place = "in vllm/model.py, line 12, __init__: assert heads % tp == 0"
    assert (failure.cause, failure.reason) == (Cause.OTHER, f"exit status 1: AssertionError {place}")
    assert explain("AssertionError\n", 1).reason == "exit status 1: AssertionError"  # no traceback, no place


def test_the_tail_shows_the_root_where_the_last_lines_do_not():
    later = "".join(f"  File wrapper, frame {number}\n" for number in range(100))
    lines = explain(TORN + later + WRAPPED, 1).log_tail.splitlines()
    assert len(lines) <= 41
    assert "(Worker_TP1 pid=8) ERROR 11-24 00:26:06 [m.py:9] AssertionError" in lines
    # 7 lines of the traceback and 3 that follow it; 108 lines in all, the last 20 of which are shown
    assert lines[10] == "… 78 lines are left out …"
    assert lines[-1] + "\n" == WRAPPED
    short = explain(TORN + WRAPPED, 1).log_tail
    assert short + "\n" == TORN + WRAPPED  # all of it, in order


def test_kv_cache_size_in_logs():
    assert kv_cache_tokens("GPU KV cache size: 4,096 tokens\nCPU KV cache size: 87,360 tokens, x") == 87360
    assert kv_cache_tokens("nothing") is None


def cell(**fields) -> Cell:
    given = {"mode": Mode.HELIX_GQA, "backend": "HELIX_CPU", "hardware": "cpu", "model": "recipe:llama-k4", "tp": 4}
    return Cell(**{**given, "kvp": 2, **fields})


def option(launched: Launch, name: str) -> str | None:
    return launched.argv[launched.argv.index(name) + 1] if name in launched.argv else None


def test_a_helix_launch_carries_proof_fault_and_forced_decode(tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    made = make_launch(cell(helix=(("allow_gqa_tpa1", True),), fault="swap-chunks"), tmp_path, 21000)
    given = option(made, "--additional-config")
    assert given is not None
    import json

    wanted = {"allow_gqa_tpa1": True, "proof_dir": str(tmp_path / "proof"), "fault": "swap-chunks"}
    assert json.loads(given) == {"helix": wanted}
    assert option(made, "--logits-processors").endswith(":ForcedDecode")
    assert "VLLM_PLUGINS" not in dict(made.env)


def test_additional_config_of_a_cell_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    made = make_launch(cell(serve=(("additional-config", '{"a": 1}'),)), tmp_path, 21000)
    assert made.argv.count("--additional-config") == 1
    assert '"a": 1' in option(made, "--additional-config")


def test_a_baseline_launch_holds_nothing_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    made = make_launch(cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", kvp=1), tmp_path, 21000)
    assert dict(made.env)["VLLM_PLUGINS"] == ""
    assert not {"--additional-config", "--logits-processors", "--helix-mode"} & set(made.argv)


def test_secrets_do_not_reach_a_server(monkeypatch):
    names = (
        "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SOME_PASSWORD", "OPENAI_API_KEY", "OPENAI_APIKEY", "GH_PAT", "MY_AUTH",
    )  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("DATABASE_URL", "postgres://me:hush@db/x")
    monkeypatch.setenv("https_proxy", "http://me:hush@proxy:80")
    for name in ("TOKENIZERS_PARALLELISM", "GIT_AUTHOR_NAME"):
        monkeypatch.setenv(name, "kept")
    env = environment(cell(), "ours", offline=True)
    assert [name for name, value in env.items() if "hush" in value] == []
    assert env["VLLM_API_KEY"] == "ours" and env["HF_HUB_OFFLINE"] == "1"
    assert env["TOKENIZERS_PARALLELISM"] == env["GIT_AUTHOR_NAME"] == "kept"
    fetching = environment(cell(), "ours", offline=False)
    assert {name for name, value in fetching.items() if "hush" in value} == {"HF_TOKEN", "https_proxy"}
