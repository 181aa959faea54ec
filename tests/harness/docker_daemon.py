"""A Docker daemon of the test's own: found, or started as root and ended again. `HELIX_TEST_DOCKER` keeps its data."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.server.containers import NoDocker, connect


class Daemon:
    """`process` is None for a daemon that was there before: that one is never stopped."""

    def __init__(self, process: subprocess.Popen | None, command: list[str]):
        self.process = process
        self.command = command

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(NoDocker):
                connect().close()
                return
            time.sleep(0.2)
        raise AssertionError("dockerd did not come up")


@contextlib.contextmanager
def daemon() -> Iterator[Daemon]:
    """A daemon that answers; the test is skipped where none does and none can be started."""
    pytest.importorskip("docker")
    with contextlib.suppress(NoDocker):
        connect().close()
        yield Daemon(None, [])
        return
    if os.getuid() != 0 or not shutil.which("dockerd"):
        pytest.skip("no Docker daemon answers, and none can be started: that takes root and dockerd")
    kept = os.environ.get("HELIX_TEST_DOCKER")
    folder = Path(kept or tempfile.mkdtemp(prefix="helix-docker-"))
    socket = f"unix://{folder}/docker.sock"
    command = ["dockerd", "-H", socket, "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"]
    made = Daemon(None, [*command, "--pidfile", f"{folder}/pid"])
    before = os.environ.get("DOCKER_HOST")
    os.environ["DOCKER_HOST"] = socket
    try:
        folder.mkdir(exist_ok=True)
        made.start()
        yield made
    finally:
        made.stop()
        if before is None:
            del os.environ["DOCKER_HOST"]
        else:
            os.environ["DOCKER_HOST"] = before
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def cli() -> str:
    """The docker command, any that is there."""
    return shutil.which("docker") or "docker"
