"""`--unit` and `--nightly`: pytest over `tests/`, in the environment that the bootstrap made."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from harness.suite import CHECKOUT, ROOT

#: What `--unit` leaves out; `tests/conftest.py` prints how many tests that were, and why.
UNIT = "not server and not nightly and not gpu"

#: pytest's exit status -> ours: 2 is also a collection error, 4 a bad option, 5 no test collected.
_STATUS = {0: 0, 1: 1, 2: 1, 3: 3, 4: 2, 5: 2}


def unit(arguments: Sequence[str]) -> int:
    """The tests that need no server, in parallel. `arguments` come last, so that they win (`-m server -n 0`)."""
    return _status(_pytest(["-n", workers(), "-m", UNIT, *arguments]))


def nightly(arguments: Sequence[str]) -> int:
    """Every test: those without servers in parallel, those with servers one by one, as they would share the cores."""
    first = _pytest(["-n", workers(), "-m", "not server", *arguments])
    second = _pytest(["-n", "0", "-m", "server", *arguments])
    passes = [status for status in (first, second) if status != 5]  # `-k` may leave one of the two without a test
    return max((_status(status) for status in passes), default=2)


def workers() -> str:
    """xdist workers: one a core up to four; more only cost memory and start-up."""
    return str(min(len(os.sched_getaffinity(0)), 4))


def _status(status: int) -> int:
    return _STATUS.get(status, 1)


def _pytest(arguments: Sequence[str]) -> int:
    if not CHECKOUT:
        print("the tests are in a checkout, and this is an installed distribution", file=sys.stderr)
        return 4
    command = [sys.executable, "-m", "pytest", "--rootdir", str(ROOT), *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # Ctrl-C reaches pytest too; it prints its summary and ends, and its status is what this call returns.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, preexec_fn=_interruptible).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
