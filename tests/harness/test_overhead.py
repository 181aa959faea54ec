"""What the harness itself holds while it runs cells: told by a process of its own, whose servers answer at once."""

import subprocess
import sys
from pathlib import Path

from made_answers import PROMPTS, server
from test_runner import Table, good

from harness.cell import Cell, Mode
from harness.matrix import PlannedCell
from harness.runner import run
from harness.verdict import Verdict

GROUPS = 12  # TP1, its TP2 and a Helix cell each: more baselines than a whole run on CPU has
PROMPTS_LONG = tuple((*prompt[:4], 70) for prompt in PROMPTS)  # 1,260 steps, as the standard workload has
MOST_BYTES = 150e6


class Answering(Table):
    """Each cell answers as a right server does, by a transcript that is made when it is asked."""

    def attempt(self, cell: Cell, folder: Path, follow, ask: bool = True):
        made = server(4e-6, cell.tp + cell.kvp, cell=cell.id, forced=not cell.baseline, prompts=PROMPTS_LONG)
        return good(cell, transcript=made.model_copy(update={"cell_key": cell.key}))


def group(seed: int) -> list[PlannedCell]:
    common = {"hardware": "cpu", "model": "recipe:llama-k4", "serve": (("seed", seed),)}
    one, base = (Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", tp=tp, **common) for tp in (1, 2))
    helix = Cell(mode=Mode.HELIX_GQA, backend="HELIX_CPU", tp=2, kvp=2, **common)
    return [
        PlannedCell(cell=cell, suites=("s",), declared=Verdict.PASS, declared_why="w", baseline=baseline)
        for cell, baseline in ((one, None), (base, one), (helix, base))
    ]


def main(run_dir: Path) -> None:
    import harness.cli
    import harness.progress  # noqa: F401  as a run has them

    plan = [item for seed in range(GROUPS) for item in group(seed)]
    results = run(plan, run_dir=run_dir, progress=lambda line: None, executor=Answering())
    assert all(result.verdict is Verdict.PASS for result in results), [result.reason for result in results]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024)


def test_a_run_of_many_cells_holds_less_than_150_mb(tmp_path):
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MOST_BYTES


if __name__ == "__main__":
    main(Path(sys.argv[1]))
