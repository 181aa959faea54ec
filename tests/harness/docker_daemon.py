"""A Docker daemon of the test's own: found, or started as root and ended again. `HELIX_TEST_DOCKER` keeps its data.

Where there is none and none can be started, tests are skipped with the reason; with `HELIX_NEED_DOCKER=1` they fail.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.server.containers import NoDocker, connect

#: One test daemon a host: a second one in the same network namespace would delete the first one's bridge.
LOCK = Path("/tmp/helix-test-dockerd.lock")
_FOLDER = "helix-docker-"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class NoDaemon(Exception):
    """dockerd did not come up; the text is the last that it said."""


class Daemon:
    """`process` is None for a daemon that was there before: that one is never stopped."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.process: subprocess.Popen | None = None

    @property
    def socket(self) -> str:
        return f"unix://{self.folder}/docker.sock"

    def start(self, tools: Path | None = None) -> None:
        """Start dockerd and wait until it answers; `tools` comes first on its PATH. NoDaemon when it does not."""
        command = [
            "dockerd", "-H", self.socket, "--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/exec",
            "--pidfile", f"{self.folder}/pid", "--shutdown-timeout", "5",
        ]  # fmt: skip
        env = {name: value for name, value in os.environ.items() if not name.startswith("HELIX_")}
        env["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}" if tools else os.environ["PATH"]
        said = self.folder / "dockerd.log"
        with said.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=env, start_new_session=True,
                preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),
            )  # fmt: skip
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(NoDocker):
                connect().close()
                return
            time.sleep(0.1)
        self.stop()
        raise NoDaemon((said.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1])

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)


@contextlib.contextmanager
def daemon() -> Iterator[Daemon]:
    """A daemon that answers; the test is skipped where none does and none can be started."""
    pytest.importorskip("docker")
    with contextlib.suppress(NoDocker):
        connect().close()
        yield Daemon()
        return
    if os.getuid() != 0 or not shutil.which("dockerd"):
        _do_without("no Docker daemon answers, and none can be started: that takes root and dockerd")
    kept = os.environ.get("HELIX_TEST_DOCKER")
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_dead(Path(tempfile.gettempdir()))
        folder = Path(kept or tempfile.mkdtemp(prefix=_FOLDER))
        folder.mkdir(parents=True, exist_ok=True)
        made = Daemon(folder)
        before = os.environ.get("DOCKER_HOST")
        os.environ["DOCKER_HOST"] = made.socket
        try:
            try:
                made.start()
            except NoDaemon as problem:
                _do_without(f"dockerd does not come up here: {problem}")
            yield made
        finally:
            made.stop()
            if before is None:
                del os.environ["DOCKER_HOST"]
            else:
                os.environ["DOCKER_HOST"] = before
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)


def remove_dead(where: Path) -> None:
    """Remove folders of test daemons whose test was killed by -9; their daemons end with it, and hold no lock."""
    for folder in where.glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int((folder / "pid").read_text()) if (folder / "pid").exists() else 0
            if not pid or not Path(f"/proc/{pid}").exists():
                shutil.rmtree(folder, ignore_errors=True)


def _do_without(why: str) -> None:
    if os.environ.get("HELIX_NEED_DOCKER", "") not in ("", "0"):
        pytest.fail(f"{why} (HELIX_NEED_DOCKER is set)")
    pytest.skip(why)


def cli() -> str:
    """The docker command, any that is there."""
    return shutil.which("docker") or "docker"
