"""The guard of one server in a container: creates it through the Docker SDK, is its log, and sees to its end.

`python -m harness.server.container --image ID --port 21000 [--mount …] [--gpu …] --grace 10 -- COMMAND …` behaves as
`harness.server.guard` does: the log on standard output, `stop` and `kill` on standard input, gone when that pipe
closes, the exit status of what it ran. Its own environment variables named by `--env` are the container's.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from harness.server.guard import Log, Told

#: Inside, a server always listens here; outside, on the leased port of 127.0.0.1.
PORT = 8000
#: Ranks of one server share memory through the container's own /dev/shm, which ends with it. Not reserved: a limit.
SHM = "16g"
#: The image's own user, where the harness is root; else the user who runs the harness.
USER = 10001
#: Who started a container: the `identity` of its guard.
GUARD_LABEL = "helix.guard"
FAILED = 125  # as `docker run` has it: the container could not be run
#: Seconds for one answer of the daemon: while a container is made, and at its end, where a hung one is not waited for.
_PATIENT, _HURRIED = 60, 3


def identity(pid: int) -> str:
    """Names one process for good, whatever the clock does: `boot:PID namespace:pid:clock ticks from boot to its start`.

    "" for one that has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot}:{namespace}:{pid}:{fields[19]}"


def user() -> str:
    uid = os.getuid()
    return f"{USER}:{USER}" if uid == 0 else f"{uid}:{os.getgid()}"


class Container:
    """One container. Every way out of it removes it, as long as the daemon answers; its processes end even without."""

    def __init__(self, options: argparse.Namespace):
        import docker

        self.options = options
        self.client = docker.from_env(timeout=_PATIENT)
        self.hurried = docker.from_env(timeout=_HURRIED)
        self.container = None
        self.copier: threading.Thread | None = None
        self.pid = 0
        self.status: int | None = None
        self.lost = ""  # why the daemon no longer answers

    def start(self) -> None:
        from docker.types import DeviceRequest

        options = self.options
        binds = {source: {"bind": target, "mode": mode} for source, target, mode in map(_mount, options.mount)}
        gpus = [DeviceRequest(device_ids=options.gpu, capabilities=[["gpu"]])] if options.gpu else None
        self.container = self.client.containers.create(
            options.image, options.command, entrypoint=[], detach=True, init=True, user=user(),
            environment={name: os.environ[name] for name in options.env},
            ports={f"{PORT}/tcp": ("127.0.0.1", options.port)},
            volumes=binds, device_requests=gpus, shm_size=SHM, ipc_mode="private", mem_limit=options.memory or None,
            read_only=True, tmpfs={"/tmp": "exec,mode=1777", "/home/helix": "exec,mode=1777"},
            cap_drop=["ALL"], security_opt=["no-new-privileges"], log_config={"type": "none"},
            labels={GUARD_LABEL: identity(os.getpid())},
        )  # fmt: skip
        log = self.container.attach(stream=True, stdout=True, stderr=True)
        self.copier = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self.copier.start()
        self.container.start()
        self.container.reload()
        self.pid = self.container.attrs["State"]["Pid"]
        threading.Thread(target=self._wait, daemon=True).start()

    def end(self, grace: float, told: Told) -> None:
        """Stop, then kill, then remove. Without a daemon its processes are killed by what the kernel knows of them."""
        with contextlib.suppress(Exception):
            if self.container is not None and self.status is None and not self.lost:
                self.hurried.api.kill(self.container.id, "SIGTERM")
                until = time.monotonic() + grace
                while self.status is None and time.monotonic() < until and not told.kill(0.05):
                    pass
        for patience in (0.5, 2.0, 0.0):
            try:
                if self.container is not None:
                    self.hurried.api.remove_container(self.container.id, force=True, v=True)
                return
            except Exception as problem:
                if getattr(problem, "status_code", None) == 404:
                    return
                self._kill_processes()
                time.sleep(patience)

    def look_for_daemon(self, seconds: float = 2.0) -> None:
        """A daemon that is stopped ends its containers first: an end from outside is its own when it is gone then."""
        until = time.monotonic() + seconds
        while not self.lost and self.status in (137, 143) and time.monotonic() < until:
            try:
                self.client.ping()
            except Exception as problem:
                self.lost = str(problem) or type(problem).__name__
            time.sleep(0.2)

    def oom_killed(self) -> bool:
        try:
            self.container.reload()
            return bool(self.container.attrs["State"]["OOMKilled"])
        except Exception:
            return False

    def end_log(self, seconds: float) -> None:
        """Wait until all that the container said is in the log: the cause of an end is often its last words."""
        if self.copier is not None:
            self.copier.join(seconds)

    def _kill_processes(self) -> None:
        """The first process of the container is its init: with it the kernel ends all others.

        Only where the kernel says that it is this container's: the daemon may count in another PID namespace.
        """
        with contextlib.suppress(OSError):
            if self.pid and self.container.id in Path(f"/proc/{self.pid}/cgroup").read_text():
                os.kill(self.pid, signal.SIGKILL)

    def _copy(self, log: Iterator[bytes]) -> None:
        with contextlib.suppress(Exception):  # the daemon went away, or the container did
            for piece in log:
                with contextlib.suppress(OSError):  # a full disk must not hold up the server
                    os.write(1, piece)

    def _wait(self) -> None:
        try:
            self.status = int(self.container.wait(timeout=None)["StatusCode"])
        except Exception as problem:
            self.lost = str(problem) or type(problem).__name__


def guard(options: argparse.Namespace) -> int:
    """Run the container to its end or until told to stop; its exit status."""
    import docker
    from docker.errors import APIError, DockerException, ImageNotFound

    told, log = Told(), Log()
    try:
        container = Container(options)
    except DockerException as problem:
        return _say(f"the Docker daemon does not answer: {problem}")
    try:
        container.start()
        while container.status is None and not container.lost and not told.stop(0.1):
            log.shorten()
        if container.status is not None or container.lost:
            container.end_log(5.0)
        if container.status and not told.words and not told.closed:
            container.look_for_daemon()
        if container.lost:
            return _say(f"the Docker daemon went away: {container.lost}")
        if container.status and container.oom_killed():
            _say(f"out of memory: a process in the container was killed at its limit of {options.memory or 'the host'}")
    except ImageNotFound:
        return _say(f"there is no image {options.image}; build it: python -m harness images build")
    except APIError as problem:
        return _say(f"cannot be run: {problem.explanation or problem}")
    except (docker.errors.DockerException, OSError) as problem:
        return _say(f"the Docker daemon went away: {problem}")
    finally:
        container.end(options.grace, told)
        container.end_log(1.0)
    return container.status if container.status is not None else 0


def _say(text: str) -> int:
    print(f"container: {text}", flush=True)
    return FAILED


def _mount(text: str) -> tuple[str, str, str]:
    source, target, mode = text.rsplit(":", 2)
    return source, target, mode


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command in a container so that nothing of it outlives it.")
    parser.add_argument("--image", required=True)
    parser.add_argument("--port", type=int, required=True, help="on 127.0.0.1 of the host")
    parser.add_argument("--mount", action="append", default=[], metavar="SOURCE:TARGET:MODE")
    parser.add_argument("--gpu", action="append", default=[], metavar="UUID")
    parser.add_argument("--env", action="append", default=[], metavar="NAME")
    parser.add_argument("--memory", default="", help="limit, as Docker writes it; default none")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
    return guard(options)


if __name__ == "__main__":
    sys.exit(main())
