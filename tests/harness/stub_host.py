"""Whole runs on stub servers, in this process or in one of its own that can be killed anywhere.

python stub_host.py RUN_DIR [--die-at STAGE] [--resume] [--jobs N] [--docker IMAGE] [BEHAVIOUR …]     one a cell
"""

import argparse
import os
import secrets
import signal
import sys
import time
from pathlib import Path

from harness import runner
from harness.cell import Cell, Mode
from harness.executors import local
from harness.executors.local import LocalExecutor
from harness.lease import Host
from harness.ledger import Ledger
from harness.matrix import PlannedCell
from harness.need import Room
from harness.server.launch import Launch
from harness.server.place import Processes
from harness.server.process import Limits, Server
from harness.verdict import Verdict

STUB = Path(__file__).with_name("stub_server.py")
ROOM = Room(gpus=(), cores=64, memory_bytes=2**50)
#: Where a harness may be killed: a name, and what is about to be called then.
STAGES = {
    "run-start": (Ledger, "run_start"),
    "cell-start": (Ledger, "cell_start"),
    "lease": (LocalExecutor, "_served"),
    "start": (Server, "_wait_ready"),
    "ask": (local, "answer_all"),
    "stop": (Server, "stop"),
    "attempt": (Ledger, "attempt"),
    "result": (Ledger, "result"),
    "run-end": (Ledger, "run_end"),
}


def cell(number: int) -> Cell:
    """A reference: it passes when it answers all. Of TP `number` up to 8, from there on with that seed."""
    return Cell(
        mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k4", tp=min(number, 8),
        serve=(("seed", number),) if number > 8 else (), workload="smoke",
    )  # fmt: skip


def number_of(cell: Cell) -> int:
    return int(dict(cell.serve).get("seed", cell.tp))


def planned(tp: int) -> PlannedCell:
    return PlannedCell(cell=cell(tp), suites=("stubs",), declared=Verdict.PASS, declared_why="")


class Stubs(Processes):
    """Each cell's server is the stub; behaviours by number, one a start, the last one again and again."""

    def __init__(self, behaviours: dict[int, list[str]], prefix: tuple[str, ...] = ()):
        self.behaviours = behaviours
        self.prefix = prefix

    def launch(self, cell: Cell, folder: Path, port: int, gpus: tuple[str, ...]) -> Launch:
        argv = (*self.prefix, sys.executable, str(STUB), self.next(cell), str(port), f"helix-{folder.name[-8:]}")
        key = secrets.token_hex(8)
        env = {**os.environ, "VLLM_API_KEY": key, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        return Launch(
            argv=argv, env=tuple(env.items()), name=argv[-1], api_key=key, port=port, model="stub",
        )  # fmt: skip

    def next(self, cell: Cell) -> str:
        left = self.behaviours[number_of(cell)]
        return left.pop(0) if len(left) > 1 else left[0]


class Contained(Stubs):
    """Each stub in a container of `image`, which holds a Python; `options` go to `harness.server.container`."""

    name = "docker"

    def __init__(self, behaviours: dict[int, list[str]], *options: str, image: str):
        super().__init__(behaviours)
        self.options = options
        self.image = image

    def launch(self, cell: Cell, folder: Path, port: int, gpus: tuple[str, ...]) -> Launch:
        return contained(self.next(cell), port, *self.options, image=self.image)


def contained(behaviour: str, port: int, *options: str, image: str) -> Launch:
    """The stub as a server in a container, answering on `port` of 127.0.0.1."""
    key = secrets.token_hex(8)
    given = {
        "VLLM_API_KEY": key,
        "STUB_BIND": "0.0.0.0",
        "PYTHONUNBUFFERED": "1",
        "STUB_FLOOD": os.environ.get("STUB_FLOOD", str(2**30)),
    }
    words = ["--image", image, "--port", str(port), "--mount", f"{STUB.parent}:/stub:ro"]
    words += [word for name in given for word in ("--env", name)]
    return Launch(
        argv=("python3", "/stub/stub_server.py", behaviour, "8000", "helix-x"),
        env=tuple({**os.environ, **given}.items()), name="helix-x", api_key=key, port=port, model="stub",
        guard=("harness.server.container", *words, *options),
    )  # fmt: skip


def play(
    run_dir: Path, behaviours: dict[int, list[str]], jobs: int = 1, resume: bool = False, limits: Limits | None = None,
    room: Room = ROOM, prefix: tuple[str, ...] = (), place: Processes | None = None,
):  # fmt: skip
    """Run one cell for each entry of `behaviours`, as processes or in `place`; the results by number."""
    limits = limits or Limits(start=20, request=5, stop=1)
    executor = LocalExecutor(limits, place or Stubs(behaviours, prefix), Host(room))
    plan = [planned(tp) for tp in behaviours]
    found = runner.run(
        plan,
        run_dir=run_dir,
        jobs=jobs,
        resume=resume,
        executor=executor,
        progress=lambda line: print(line, flush=True),
    )
    return {number_of(result.cell): result for result in found}


def die_at(stage: str) -> None:
    """Kill this process by -9 when the stage of the second cell (or of the run) is reached."""
    owner, name = STAGES[stage]
    original, calls = getattr(owner, name), []

    def deadly(*arguments, **options):
        calls.append(name)
        if len(calls) == (1 if stage.startswith("run-") else 2):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, deadly)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--die-at", choices=STAGES)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--docker", metavar="IMAGE")
    parser.add_argument("behaviours", nargs="*")
    options = parser.parse_intermixed_args()
    runner.code_key = lambda: "the same"  # whoever edits the code meanwhile
    if options.die_at:
        die_at(options.die_at)
    behaviours = {tp: [behaviour] for tp, behaviour in enumerate(options.behaviours or ["well"] * 3, 1)}
    place = Contained(behaviours, image=options.docker) if options.docker else None
    try:
        play(options.run_dir, behaviours, options.jobs, options.resume, place=place)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as harness/run.py: the second may come while this one ends
        sys.exit(130)


if __name__ == "__main__":
    main()
