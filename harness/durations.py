"""How long cells took in earlier runs, asked of a process of its own.

    python -m harness.durations REPORTS

The history is read with pandas and DuckDB, which a harness that only watches servers would keep in memory for hours.
"""

import json
import subprocess
import sys
from pathlib import Path


def seconds_before(reports: Path) -> dict[str, float]:
    """Seconds by cell id, of the last run in `reports` that timed the cell; empty where nothing can be read."""
    command = [sys.executable, "-m", "harness.durations", str(reports)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def main(reports: Path) -> None:
    from harness.report.history import find_runs, seconds_by_cell

    print(json.dumps(seconds_by_cell(find_runs(reports))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
