"""`python -m harness`: the same program as `./test_helix.sh`, without the bootstrap."""

import shlex
import signal
import sys

try:
    from harness.cli import main
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] in ("harness", "helix_runtime"):
        raise  # ours: not a matter of the environment
    again = shlex.join(["./test_helix.sh", *sys.argv[1:]])
    print(
        f"harness: error: {sys.executable} has no module {missing.name!r}; {again} makes an environment and runs, "
        "or add what is missing to this one: pip install -e '.[dev]'",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the status is known: a late Ctrl-C does not change it
    sys.exit(status)
