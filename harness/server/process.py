"""A server as local processes: start, health, teardown."""

import contextlib
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import httpx

from harness.cell import Cell
from harness.frozen import Frozen
from harness.redact import hide_in_file
from harness.server import warm
from harness.server.launch import Launch, make_launch
from harness.server.log import Cause, Failure, explain, kv_cache_tokens, read_log, tail
from harness.server.strays import end_strays

#: For clients of servers, which are on loopback: without TLS, whose certificates take each client 20 ms to load, and
#: never through a proxy that the environment names, which could not reach them and would be told their keys.
ON_LOOPBACK = {"verify": False, "trust_env": False}


class Limits(Frozen):
    """Deadlines in seconds: until ready, for one request, from asking to stop until the kill."""

    start: float = 300.0
    request: float = 180.0
    stop: float = 15.0


class ServerFailed(Exception):
    """A server did not start, or died. `failure` says why."""

    def __init__(self, failure: Failure):
        super().__init__(f"{failure.cause}: {failure.reason}")
        self.failure = failure


class Server:
    """One running server, or a context manager for it. After `stop`, nothing of it is left on the host.

    `cancel` is looked at while waiting: when set, the server is stopped and ServerFailed(INTERRUPTED) raised. `lease`:
    the descriptor of a lease, which the guard holds too, so that it ends no earlier than the server.
    """

    def __init__(
        self,
        launch: Launch,
        log: Path,
        limits: Limits | None = None,
        cancel: threading.Event | None = None,
        lease: int | None = None,
    ):
        self.launch = launch
        self.log = log
        self.limits = limits or Limits()
        self.cancel = cancel or threading.Event()
        self.lease = lease
        self._born = time.time()
        self._guard: subprocess.Popen | warm.WarmGuard | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self.launch.url

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.launch.api_key}"}

    def start(self) -> "Server":
        """Start and wait until our own model answers with one token. Raises ServerFailed, and then nothing is left."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._guard = self._warm(log.fileno()) or self._cold(log)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def warm_up(self) -> None:
        """Make, or wait for, the warm process that forks this server, where there may be one."""
        if self.launch.forked:
            warm.starter(self.launch.env, self.cancel)

    def _warm(self, log: int) -> warm.WarmGuard | None:
        launch = self.launch
        starter = warm.starter(launch.env, self.cancel) if launch.forked else None
        return starter and starter.start(launch.forked, dict(launch.env), self.limits.stop, log, self.lease)

    def _cold(self, log: BinaryIO) -> subprocess.Popen:
        guard = [sys.executable, "-m", *self.launch.guard, "--grace", str(self.limits.stop), "--"]
        return subprocess.Popen(
            [*guard, *self.launch.argv],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(self.launch.env),
            start_new_session=True,
            pass_fds=() if self.lease is None else (self.lease,),
        )

    def failure(self) -> Failure | None:
        """Why the server is dead; None while it lives."""
        if self._guard is None or (status := self._guard.poll()) is None:
            return None
        return explain(read_log(self.log), status)

    def check(self) -> None:
        """Raises ServerFailed when the server is dead or the run was cancelled."""
        if self.cancel.is_set():
            raise ServerFailed(Failure(cause=Cause.INTERRUPTED, reason="the run was interrupted"))
        if failure := self.failure():
            raise ServerFailed(failure)

    def kv_cache_tokens(self) -> int | None:
        return kv_cache_tokens(read_log(self.log))

    def stop(self, now: bool = False) -> None:
        """End the server and all below it: SIGTERM, then SIGKILL after `limits.stop`, at once with `now`."""
        guard = self._guard
        if guard is None or guard.stdin is None:
            return
        with self._lock, contextlib.suppress(BrokenPipeError, ValueError):  # the guard is gone, or was told before
            guard.stdin.write(b"kill\n" if now else b"stop\n")
            guard.stdin.flush()
        try:
            guard.wait(self.limits.stop + 15)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
        if guard.returncode < 0:  # killed before its work was done
            end_strays(guard.pid, self.launch.api_key, self._born)
        hide_in_file(self.log, (self.launch.api_key,))
        with self._lock, contextlib.suppress(BrokenPipeError):
            guard.stdin.close()

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop(now=isinstance(error, KeyboardInterrupt))

    def _wait_ready(self) -> None:
        until = time.monotonic() + self.limits.start
        with httpx.Client(base_url=self.url, headers=self.headers, timeout=5.0, **ON_LOOPBACK) as client:
            while not self._is_ours(client):
                self.check()
                if time.monotonic() > until:
                    text = tail(read_log(self.log))
                    reason = f"not ready after {self.limits.start:.0f} s"
                    raise ServerFailed(Failure(cause=Cause.TIMEOUT, reason=reason, log_tail=text))
                self.cancel.wait(0.2)
            self._first_token(client)

    def _is_ours(self, client: httpx.Client) -> bool:
        """Whether /v1/models shows our nonce; a stranger on our port raises."""
        try:
            reply = client.get("/v1/models")
        except httpx.TransportError:
            return False
        if reply.status_code == 503:
            return False
        try:
            names = [model["id"] for model in reply.json()["data"]] if reply.is_success else []
        except (ValueError, KeyError, TypeError):
            names = []
        if self.launch.name not in names:
            reason = f"another server answers on port {self.launch.port} (HTTP {reply.status_code}, models {names})"
            raise ServerFailed(Failure(cause=Cause.PORT_IN_USE, reason=reason, log_tail=tail(read_log(self.log))))
        return True

    def _first_token(self, client: httpx.Client) -> None:
        """One token must come, and a request without our key must be turned away."""
        body = {"model": self.launch.name, "prompt": [5], "max_tokens": 1, "temperature": 0}
        wrong = {"Authorization": f"Bearer {secrets.token_hex(4)}"}
        try:
            turned_away = client.post("/v1/completions", json=body, headers=wrong).status_code
            reply = client.post("/v1/completions", json=body, timeout=self.limits.request)
        except httpx.TransportError as error:
            self._settle()
            hangs = isinstance(error, httpx.TimeoutException)
            reason = f"no first token: {type(error).__name__}: {error}"
            reason += f" within {self.limits.request:.0f} s" if hangs else ""
            cause = Cause.TIMEOUT if hangs else Cause.BROKEN_ANSWER
            raise ServerFailed(Failure(cause=cause, reason=reason, log_tail=tail(read_log(self.log)))) from error
        if not reply.is_success or turned_away != 401:
            reason = f"no first token: HTTP {reply.status_code} {reply.text[:300]}; without the key HTTP {turned_away}"
            raise ServerFailed(Failure(cause=Cause.OTHER, reason=reason, log_tail=tail(read_log(self.log))))

    @property
    def settling(self) -> float:
        """Seconds in which the end of a dying server is known. A container's is told by its daemon and looked into."""
        return 12.0 if self.launch.guard[0] == "harness.server.container" else 3.0

    def _settle(self) -> None:
        """Give a dying server a moment to die, so that its log, not the broken connection, gives the cause."""
        until = time.monotonic() + self.settling
        while time.monotonic() < until:
            self.check()
            time.sleep(0.05)


def start(
    cell: Cell, folder: Path, port: int, limits: Limits | None = None, cancel: threading.Event | None = None
) -> Server:
    """Start `cell`'s server with its log and proofs in `folder`; ServerFailed when it does not come up."""
    folder = folder.absolute()
    return Server(make_launch(cell, folder, port), folder / "server.log", limits, cancel).start()
