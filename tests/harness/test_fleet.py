"""A simulated fleet: many hosts, thousands of cells, attempts that only take time. The scheduler alone is real."""

import random
import resource
import threading
import time

import pytest
from test_runner import good, transcript

from harness.cell import Cell, Mode
from harness.matrix import PlannedCell
from harness.runner import run
from harness.verdict import Verdict


class Fleet:
    """Hosts with GPUs; a cell takes its TP on one of them, the fullest that fits, for `seconds` of its own.

    `leased`: (time, GPUs leased, GPUs that ready cells wait for) at each change, times from the first lease.
    """

    def __init__(self, hosts: int, gpus: int, seconds: dict[str, float]):
        self.free = [gpus] * hosts
        self.total = hosts * gpus
        self.seconds = seconds
        self.cancel = threading.Event()
        self.lock = threading.Lock()
        self.where: dict[str, int] = {}
        self.changes: list[tuple[float, int]] = []
        self.last_reserved = 0.0

    def reserve(self, cell: Cell, ask: bool = True) -> bool:
        with self.lock:
            fits = [host for host, free in enumerate(self.free) if free >= cell.tp]
            if not fits:
                return False
            host = min(fits, key=lambda place: self.free[place])
            self.free[host] -= cell.tp
            self.where[cell.key] = host
            self._note()
            self.last_reserved = self.changes[-1][0]
            return True

    def attempt(self, cell: Cell, folder, follow, ask: bool = True):
        time.sleep(self.seconds[cell.key])
        with self.lock:
            self.free[self.where[cell.key]] += cell.tp
            self._note()
        return good(cell, transcript=transcript(cell), proofs=())

    def give_back(self) -> None:
        pass

    def end_all(self) -> None:
        self.cancel.set()

    def _note(self) -> None:
        self.changes.append((time.monotonic(), self.total - sum(self.free)))

    @property
    def share(self) -> float:
        """GPU time leased over GPU time there was, from the first lease until the last cell was leased."""
        leased = sum(
            used * (min(then, self.last_reserved) - now)
            for (now, used), (then, _) in zip(self.changes, self.changes[1:], strict=False)
            if now < self.last_reserved
        )
        return leased / self.total / (self.last_reserved - self.changes[0][0])


def many(count: int, models: int) -> list[PlannedCell]:
    """`count` cells of hub models: of each model a baseline of TP 2, 4 and 8, and cells that compare with them."""
    plan: list[PlannedCell] = []
    sizes = (8, 4, 2)
    per = count // (models * len(sizes))
    for number in range(models):
        for tp in sizes:
            base = Cell(
                mode=Mode.STANDARD_TP, backend="FLASH_ATTN", hardware="hopper", model=f"org/model-{number}", tp=tp
            )
            for cell in (
                base,
                *(
                    base.model_copy(update={"mode": Mode.STANDARD_DCP, "kvp": 2, "interleave": place})
                    for place in range(1, per)
                ),
            ):
                plan.append(PlannedCell(
                    cell=cell, suites=("s",), declared=Verdict.PASS, declared_why="w",
                    baseline=None if cell.baseline else base,
                ))  # fmt: skip
    return plan


def simulated(tmp_path, hosts: int, count: int, models: int, low: float, high: float) -> tuple[Fleet, list]:
    plan = many(count, models)
    dice = random.Random(3)
    fleet = Fleet(hosts, 8, {item.cell.key: dice.uniform(low, high) for item in plan})
    found = run(
        plan, run_dir=tmp_path, jobs=hosts * 8, progress=lambda line: None, executor=fleet, localise=False
    )  # fmt: skip
    assert len(found) == len(plan) and sum(fleet.free) == fleet.total
    return fleet, found


def test_a_small_fleet_is_kept_busy(tmp_path):
    fleet, _ = simulated(tmp_path, hosts=4, count=90, models=5, low=0.4, high=0.8)
    assert fleet.share >= 0.75  # other work on this host delays the scheduler's 0.1 s steps


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_64_hosts_and_5000_cells(tmp_path):
    fleet, found = simulated(tmp_path, hosts=64, count=5040, models=80, low=2, high=10)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n{len(found)} cells: {fleet.share:.1%} leased until the last lease; driver {megabytes:.0f} MB")
    assert len(found) == 5040 and fleet.share >= 0.9 and megabytes < 1000
