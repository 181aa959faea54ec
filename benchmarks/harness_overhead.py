"""What the harness itself costs: its share of a run's wall time, its memory, and how long it lists many cells.

    python benchmarks/harness_overhead.py RUN_DIR …      from ledgers of runs with --jobs 1
    python benchmarks/harness_overhead.py --list 10000   the time of `--list` over that many cells, in its own process

A run's own time is what is not in a server's start, its answers or its end: planning, leases, judging, the ledger.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from harness import ledger

REPEATS = 5  # of `--list`: others use the processor too
#: Phases in which the harness waits for a server or measures with it, or for what others hold.
_WAITING = ("imports", "start", "workload", "null band", "stop", "lease")


def of_run(run_dir: Path) -> dict[str, float]:
    """Seconds and MB of the last session of the run in `run_dir`. ValueError where it did not end."""
    events, _ = ledger.read(ledger.find(run_dir))
    begin = max(index for index, event in enumerate(events) if event["event"] == "run-start")
    session = events[begin:]
    end = next((event for event in session if event["event"] == "run-end" and "peak_bytes" in event), None)
    if end is None:
        raise ValueError(f"{run_dir}: the run did not end, or is of an earlier version")
    first, last = (datetime.fromisoformat(event["time"]) for event in (session[0], end))
    wall = (last - first).total_seconds()
    phases = [phase for event in session if event["event"] == "result" for phase in event["result"]["phases"]]
    servers = sum(phase["seconds"] for phase in phases if phase["name"] in _WAITING)
    return {
        "wall_s": round(wall, 2),
        "servers_s": round(servers, 2),
        "own_s": round(wall - servers, 2),
        "own_percent": round(100 * (wall - servers) / wall, 2),
        "cpu_s": end["cpu_seconds"],
        "cpu_percent": round(100 * end["cpu_seconds"] / wall, 2),
        "peak_mb": round(end["peak_bytes"] / 1e6, 1),
    }


SUITE = """\
schema: 1
name: many
description: "Many cells, to be listed."
groups:
  - name: many
    mode: helix-gqa
    backend: HELIX_CPU
    hardware: cpu
    model: recipe:llama-k4
    layout: [{tp: 4, dcp: 2}, {tp: 8, dcp: 2}]
    interleave: [1, 2, 4, 8, 16]
    comm: [a2a, ag_rs]
    serve: {seed: [SEEDS]}
"""


def of_list(cells: int) -> dict[str, float]:
    """Seconds of `--list` over at least `cells` cells, baselines included: the best of REPEATS by CPU seconds,
    and that call's by the wall's.
    """
    seeds = range(-(-cells // 24))  # 20 cells and their 4 baselines each
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "many.yaml"
        suite.write_text(SUITE.replace("SEEDS", ", ".join(map(str, seeds))))
        command = [sys.executable, "-m", "harness", "--suite", str(suite), "--list"]
        best = None
        for _ in range(REPEATS):
            before, began = os.times(), time.monotonic()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            wall, after = time.monotonic() - began, os.times()
            if done.returncode:
                raise ValueError(f"--list ended with {done.returncode}: {done.stdout}")
            used = sum(after[2:4]) - sum(before[2:4])  # of children: user and system
            best = min(best or (used, wall), (used, wall))
    listed = int(next(line for line in done.stdout.splitlines() if "cells in all" in line).split()[0])
    return {"cells": listed, "cpu_s": round(best[0], 3), "wall_s": round(best[1], 3), "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", nargs="*", type=Path)
    parser.add_argument("--list", type=int, metavar="CELLS")
    options = parser.parse_args()
    for run_dir in options.run_dir:
        print(json.dumps({"run": run_dir.name, **of_run(run_dir)}))
    if options.list:
        print(json.dumps(of_list(options.list)))


if __name__ == "__main__":
    main()
