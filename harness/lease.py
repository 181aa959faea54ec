"""Leases of this host's scarce things across processes. For now: TCP ports.

A lease is an exclusive `flock` on a small file, so the kernel gives it back when its holder dies, however it dies.
"""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Below Linux's ephemeral range, so that no outgoing connection sits on a leased port.
PORTS = range(21000, 29000)


def lease_folder() -> Path:
    """Where lease files lie: one folder a user, shared by all runs on this host."""
    folder = Path(tempfile.gettempdir()) / f"helix-leases-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextmanager
def lease_port(ports: range = PORTS) -> Iterator[int]:
    """A port on 127.0.0.1 that no other harness holds and nothing listens on. RuntimeError when there is none."""
    folder = lease_folder()
    start = os.getpid() % len(ports)  # runs that start together look at different ports first
    for port in (ports[(start + step) % len(ports)] for step in range(len(ports))):
        descriptor = os.open(folder / f"port-{port}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _locked(descriptor) and _free(port):
                yield port
                return
        finally:
            os.close(descriptor)
    raise RuntimeError(f"no free port on 127.0.0.1 from {ports.start} to {ports.stop - 1}")


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
