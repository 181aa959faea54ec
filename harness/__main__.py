"""`python -m harness`: the same program as `./test_helix.sh`, without the bootstrap."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main())
