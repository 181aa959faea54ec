"""A simulated fleet: many hosts, thousands of cells. Scheduler, client, oracle, ledger and report are real; servers are
stubs that take as long as real ones did."""

import os
import random
import resource
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from fleet import Fleet
from stub_fleet import Stub

from harness.cell import Cell, Mode
from harness.client import _batches
from harness.executors.local import in_other_batches, workload_for
from harness.ledger import find, read
from harness.matrix import PlannedCell
from harness.report import write
from harness.result import CellResult
from harness.runner import run
from harness.suite import ROOT
from harness.verdict import Verdict
from harness.workload import Workload

EVIDENCE = ROOT / "reports" / "2026-11-26-h100"
CAUSES = {"dies": "other", "killed": "killed"}  # as the ledger has it
PHASES = ("start", "workload", "null band", "stop")
SIZES = (8, 4, 2)
ASKED = "smoke@1"  # 15 prompts of up to 1,000 tokens, 208 tokens to generate


def many(count: int, models: int) -> list[PlannedCell]:
    """`count` cells: of each of `models` seeds a baseline of TP 8, 4 and 2, and cells that compare with them. Every
    40th of these has a defect, and is to fail."""
    plan: list[PlannedCell] = []
    for seed in range(models):
        for tp in SIZES:
            base = Cell(
                mode=Mode.STANDARD_TP, backend="FLASH_ATTN", hardware="hopper", model="recipe:llama-k8-h64", tp=tp,
                serve=(("dtype", "bfloat16"), ("seed", seed)), workload=ASKED,
            )  # fmt: skip
            plan.append(planned(base, None))
            for place in range(1, count // (models * len(SIZES))):
                fault = "drop-shard" if len(plan) % 40 == 20 else None
                change = {"mode": Mode.HELIX_GQA, "kvp": 2, "comm": "a2a", "interleave": place, "fault": fault}
                plan.append(planned(base.model_copy(update=change), base))
    return plan


def planned(cell: Cell, base: Cell | None) -> PlannedCell:
    declared = Verdict.FAIL if cell.fault else Verdict.PASS
    return PlannedCell(cell=cell, suites=("fleet",), declared=declared, declared_why="w", baseline=base)


class Behaviour:
    """Who behaves how, and takes how long: as some cell of its kind in EVIDENCE did, `faster` times as fast.

    Of those that compare and have no defect, every 60th dies when it is first asked, every 90th is killed at its start.
    """

    def __init__(self, plan: list[PlannedCell], faster: float):
        self.faster = faster
        sound = [item.cell.key for item in plan if item.baseline and not item.cell.fault]
        self.stopped = {key: "dies" for key in sound[::60]} | {key: "killed" for key in sound[30::90]}
        self.measured = measured()
        asked = workload_for(plan[0].cell)  # all are asked as many tokens
        self.steps = {False: rounds(asked), True: rounds(asked) + rounds(in_other_batches(asked))}

    def __call__(self, cell: Cell, number: int) -> Stub:
        took = self.took(cell)
        answering = took["workload"] + took.get("null band", 0)
        first = self.stopped.get(cell.key, "well") if number == 1 else "well"
        return Stub(
            salt=cell.key, start=took["start"], step=answering / self.steps[cell.baseline], stop=took["stop"],
            behaviour="wrong" if cell.fault else first,
        )  # fmt: skip

    def took(self, cell: Cell) -> dict[str, float]:
        drawn = random.Random(cell.key).choice(self.measured[cell.baseline])
        return {name: seconds / self.faster for name, seconds in drawn.items()}


@cache
def measured() -> dict[bool, list[dict[str, float]]]:
    """Seconds by phase of the cells on H100 that were asked: True, baselines with a null band; False, Helix cells."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for event in read(find(EVIDENCE))[0]:
        phases = {one["name"]: one["seconds"] for one in event.get("result", {}).get("phases", ())}
        if "workload" in phases:
            baseline = event["result"]["cell"]["mode"] == Mode.STANDARD_TP
            if not baseline or "null band" in phases:
                found[baseline].append({name: phases[name] for name in PHASES if name in phases})
    return found


def rounds(workload: Workload) -> int:
    """Decode steps that a server makes for it: those of a batch at the same time."""
    return sum(max(prompt.max_tokens for prompt in batch) for batch in _batches(workload.prompts))


def simulated(run_dir: Path, hosts: int, count: int, models: int, faster: float) -> Fleet:
    """Run and draw it. What each cell must come to is asserted here: the verdict, and how many attempts it took."""
    plan = many(count, models)
    behaviour = Behaviour(plan, faster)
    with Fleet(hosts, 8, behaviour, lose=count // 3) as fleet:
        found = run(plan, run_dir=run_dir, jobs=hosts * 8, progress=lambda line: None, executor=fleet)
    began = time.monotonic()
    page = write(run_dir)
    drawn, lost = time.monotonic() - began, behaviour.stopped | dict.fromkeys(fleet.lost, "killed")
    print(f"\n{count} cells in {fleet.seconds:.0f} s, {faster:g} times as fast as real; lost at first: {len(lost)},")
    print(
        f"of them with their host: {len(fleet.lost)}; report of {page.stat().st_size / 2**20:.1f} MiB in {drawn:.0f} s"
    )
    tell_load(found, behaviour, fleet)
    print(f"{fleet.share:.1%} leased until the last lease; driver {megabytes():.0f} MB")
    assert [one.cell.key for one in found] == [item.cell.key for item in plan]
    assert [(one.cell.id, one.verdict, one.reason) for one in found if one.verdict is not one.declared] == []
    assert {one.verdict for one in found} == {Verdict.PASS, Verdict.FAIL}
    assert fleet.lost and len(fleet.free) == hosts - 1 and sum(fleet.free.values()) == 8 * (hosts - 1)
    assert {one.cell.key: one.attempts for one in found if one.attempts > 1} == dict.fromkeys(lost, 2)
    assert all(one.statistics and len(one.proof) == one.cell.tp for one in found if not one.cell.baseline)
    events, warnings = read(find(run_dir))
    causes = Counter(event["cause"] for event in events if event["event"] == "attempt")
    assert warnings == [] and causes == {None: count, **Counter(CAUSES[how] for how in lost.values())}
    return fleet


def tell_load(found: list[CellResult], behaviour: Behaviour, fleet: Fleet) -> None:
    """How far this machine's own load stretched what was to be simulated."""
    longer = [
        sum(phase.seconds for phase in one.phases if phase.name in PHASES) / sum(behaviour.took(one.cell).values())
        for one in found if one.attempts == 1
    ]  # fmt: skip
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"an attempt took {sum(longer) / len(longer):.3f} times what was drawn for it, at most {max(longer):.2f}")
    print(f"CPU seconds of hosts {fleet.cpu_seconds:.0f}, of the driver {used.ru_utime + used.ru_stime:.0f}")


def megabytes() -> float:
    """The most memory that this process, the driver, has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_a_small_fleet_is_judged_and_what_is_lost_runs_again(tmp_path):
    simulated(tmp_path, hosts=4, count=54, models=3, faster=100)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_64_hosts_and_5000_cells(tmp_path):
    """HELIX_FLEET_FASTER=1: as long as real cells took, an hour."""
    fleet = simulated(
        tmp_path, hosts=64, count=5040, models=80, faster=float(os.environ.get("HELIX_FLEET_FASTER", "4"))
    )
    assert fleet.share >= 0.9 and megabytes() < 1000
