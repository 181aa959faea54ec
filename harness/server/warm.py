"""A warm start: one process imports torch and vLLM once, and every CPU server of a run is forked from it.

    python -m harness.server.warm DESCRIPTOR MODULE …        imports the modules, then forks what DESCRIPTOR asks for

Importing vLLM takes most of a small server's start, and a run on CPU starts dozens. Each is forked from a process that
has done nothing but import, with its own environment set before it runs, so that it finds what a new process would
find. What may be read while importing is never changed afterwards: launches share a warm process only if their
environments are the same but for `SET_LATER`. So a stock server (no plugin) and one with Helix never share one.

What is forked is the guard (`harness.server.guard`), which forks the server: they end as they do without this, and a
guard outlives a killed harness as long as it takes to end its server. The warm process ends with the harness.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from typing import BinaryIO

from harness.server import fork_start, guard

#: Environment variables that nothing reads while it is imported.
SET_LATER = ("TMPDIR", "VLLM_API_KEY")
#: What both kinds of CPU server import before anything else happens, above all before plugins are loaded.
PRELOAD = ("vllm.entrypoints.launchers.api_server.entry",)
#: So many warm processes are kept, of half a gigabyte each: stock and Helix, eager and compiled.
KEPT = 4
_LOST = -signal.SIGKILL  # of a guard that ended without a word, which only that does
_MOST = 1 << 20  # bytes of a request


class WarmGuard:
    """A forked guard, with what `subprocess.Popen` has of one: `stdin`, `poll`, `wait`, `kill`, `pid`, `returncode`."""

    def __init__(self, pid: int, stdin: BinaryIO, status: int):
        self.pid = pid
        self.stdin = stdin
        self._status = status
        self.returncode: int | None = None
        self._handle = _handle(pid)

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once there is one. Raises subprocess.TimeoutExpired."""
        ended = self._wait(timeout)
        if ended is None:
            raise subprocess.TimeoutExpired("guard", timeout or 0)
        return ended

    def kill(self) -> None:
        if self._handle is not None and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            told = os.read(self._status, 16)
            self.returncode = int(told) if told else _LOST
            os.close(self._status)
            if self._handle is not None:  # it has said all; what it holds is free once it is gone
                select.select([self._handle], [], [], 5.0)
                os.close(self._handle)
        return self.returncode


def _handle(pid: int) -> int | None:
    """A descriptor of the process, which no other process can take over; None when it has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


class Starter:
    """The warm process of one environment. `start` forks a guard with its server."""

    def __init__(self, env: dict[str, str], modules: Sequence[str] = PRELOAD):
        self._lock = threading.Lock()
        self._ready = False
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.server.warm", str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=env,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )

    def ready(self, cancel: threading.Event) -> bool:
        """Wait until all is imported, or `cancel` is set. False when it is not: servers are started without it then."""
        with self._lock:
            while not self._ready and not cancel.is_set() and self._ours.fileno() >= 0:  # closed meanwhile: never
                if select.select([self._ours], [], [], 0.2)[0]:
                    if not self._ours.recv(_MOST):
                        break
                    self._ready = True
            return self._ready

    def start(
        self, argv: Sequence[str], env: dict[str, str], grace: float, log: int, lease: int | None
    ) -> WarmGuard | None:
        """The guard of a new server: `argv` is a module and its arguments. None when the warm process is gone."""
        hear, say = os.pipe()
        status, tell = os.pipe()
        given = [hear, log, tell, *([] if lease is None else [lease])]
        try:
            with self._lock:
                answer = self._ask({"argv": list(argv), "env": env, "grace": grace}, given)
        finally:
            os.close(hear)
            os.close(tell)
        if answer is None:
            os.close(say)
            os.close(status)
            return None
        return WarmGuard(answer["pid"], open(say, "wb", buffering=0), status)

    def _ask(self, request: dict, descriptors: Sequence[int] = ()) -> dict | None:
        try:
            socket.send_fds(self._ours, [json.dumps(request).encode()], descriptors)
            answer = self._ours.recv(_MOST)
        except OSError:
            return None
        return json.loads(answer) if answer else None

    def close(self) -> None:
        """End the warm process; servers that it started live on."""
        with self._lock:  # nobody waits for an answer on it
            self._ours.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_starters: dict[tuple[tuple[str, str], ...], Starter] = {}
_making = threading.Lock()


def starter(env: Sequence[tuple[str, str]], cancel: threading.Event) -> Starter | None:
    """The warm process for servers with this environment, made at first use; None where it does not come up, or where
    `HELIX_WARM=0` says that every server shall pay its own imports."""
    if os.environ.get("HELIX_WARM") == "0":
        return None
    key = tuple(sorted((name, value) for name, value in env if name not in SET_LATER))
    with _making:
        found = _starters[key] = _starters.pop(key, None) or Starter(dict(key))
        while len(_starters) > KEPT:  # whoever still asks it starts its server cold
            _starters.pop(next(iter(_starters))).close()
    return found if found.ready(cancel) else None


@atexit.register
def close_all() -> None:
    """End every warm process of this harness."""
    while _starters:
        _starters.popitem()[1].close()


class _Forked:
    """A forked server, with what the guard uses of `subprocess.Popen`."""

    def __init__(self, argv: Sequence[str], env: dict[str, str], given: Sequence[int]):
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become_server(argv, env, given)

    def poll(self) -> int | None:
        return self._collect(os.WNOHANG)

    def wait(self) -> int | None:
        return self._collect(0)

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _collect(self, options: int) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status


def _become_server(argv: Sequence[str], env: dict[str, str], given: Sequence[int]) -> None:
    """In the forked child: run the module as a new process would, and end without a way back into the guard."""
    code = 1
    try:
        guard.end_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # SIGINT stays ignored, as below any guard
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for descriptor in (nothing, *given):
            os.close(descriptor)
        _set_environment(env)
        fork_start.run(list(argv))
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _set_environment(env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # as TMPDIR says now


def _become_guard(request: dict, given: Sequence[int]) -> None:
    """In the forked child: the guard of the server that was asked for. Tells its exit status on a pipe."""
    status = 1
    hear, log, tell, *lease = given
    try:
        os.setsid()
        os.dup2(hear, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(hear)
        os.close(log)
        _set_environment(request["env"])
        status = guard.guard(lambda env: _Forked(request["argv"], env, (tell, *lease)), request["grace"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(tell, str(status).encode())
        os._exit(status & 0xFF)


def serve(control: socket.socket) -> None:
    """Fork what is asked for, until the harness is gone. Children that have ended are collected on the way."""
    while True:
        heard, _, _ = select.select([control], [], [], 1.0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not heard:
            continue
        try:
            asked, given, _, _ = socket.recv_fds(control, _MOST, 8)
        except OSError:
            return
        if not asked:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            _become_guard(json.loads(asked), given)
        for descriptor in given:
            os.close(descriptor)
        try:
            control.send(json.dumps({"pid": pid}).encode())
        except OSError:
            return


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(arguments[0]))
    for module in arguments[1:]:
        importlib.import_module(module)
    gc.freeze()  # so that collections in the forked processes neither visit nor copy what was imported
    with contextlib.suppress(BrokenPipeError):  # the harness has gone meanwhile
        control.send(b"ready")
        serve(control)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
