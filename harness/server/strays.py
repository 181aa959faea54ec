"""What a guard that was itself killed leaves of its server: found by its session and its key, and ended."""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil

from harness.server.guard import scratch_prefix, shared_memory, sweep


def end_strays(session: int, api_key: str, born: float, patience: float = 5.0) -> list[int]:
    """Kill what is left of the server whose guard had PID `session`, and remove its shared memory and its temporary
    folder; returns the PIDs. `born`: seconds of the epoch before its start.

    Its processes are in the guard's session, whose number the kernel gives to nobody else while one of them lives, or
    were started with the server's own key in their environment (those that were forked show their parent's).
    """
    ended: list[int] = []
    shared: set[str] = set()
    until = time.monotonic() + patience
    while (left := _left(session, api_key)) and time.monotonic() < until:
        for process in left:
            shared |= shared_memory(process.pid)
            ended.append(process.pid)
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)
    sweep(shared, born)
    for folder in Path(tempfile.gettempdir()).glob(f"{scratch_prefix(session)}*"):
        shutil.rmtree(folder, ignore_errors=True)
    return sorted(set(ended))


def _left(session: int, api_key: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getsid(process.pid) == session or process.environ().get("VLLM_API_KEY") == api_key:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found
