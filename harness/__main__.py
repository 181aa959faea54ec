"""`python -m harness`: the same program as `./test_helix.sh`, without the bootstrap."""

import signal
import sys

from harness.cli import main

if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the status is known: a late Ctrl-C does not change it
    sys.exit(status)
