"""pytest as a front of the scheduler: each cell of a suite file is a test, `pytest suites/smoke.yaml -k tp4 -n 2`.

A test runs its cell through the same runner, after what it is compared with; processes of pytest-xdist share the host
by the same leases as harnesses do. Each of them has a folder in `reports/runs`, in which a baseline is run once.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.hardware import detect
from harness.matrix import PlannedCell, expand
from harness.need import Room, fit, host_cores, host_memory
from harness.result import CellResult
from harness.run import RUNS
from harness.runner import run
from harness.suite import load_all
from harness.verdict import Effect, Verdict

_STARTED = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "SuiteFile | None":
    """pytest's hook: a `.yaml` file is a suite."""
    return SuiteFile.from_parent(parent, path=file_path) if file_path.suffix in (".yaml", ".yml") else None


class SuiteFile(pytest.File):
    def collect(self) -> Iterator["CellTest"]:
        room = Room(cores=host_cores(), memory_bytes=host_memory())
        plan = fit(expand(load_all([str(self.path)]), detect()), room)
        known = {item.cell.key: item for item in plan}
        for item in plan:
            chain = [item]
            while (base := chain[0].baseline) is not None:
                chain.insert(0, known[base.key])
            yield CellTest.from_parent(self, name=item.cell.id, chain=chain)


class CellTest(pytest.Item):
    """One cell, after what it is compared with (`chain`, the cell last)."""

    def __init__(self, *, chain: list[PlannedCell], **arguments):
        super().__init__(**arguments)
        self.chain = chain

    def runtest(self) -> None:
        if self.chain[-1].skip is not None:
            pytest.skip(self.chain[-1].skip)
        result = run(self.chain, run_dir=run_folder(), resume=True, progress=lambda line: None)[-1]
        if result.verdict is Verdict.SKIP:
            pytest.skip(result.reason)
        if result.effect is not Effect.OK:
            raise NotAsDeclared(result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo, style: str | None = None) -> object:
        if isinstance(excinfo.value, NotAsDeclared):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


class NotAsDeclared(Exception):
    """The verdict of a cell is not the declared one, or infrastructure failed."""

    def __init__(self, result: CellResult):
        super().__init__(
            f"{result.verdict}: {result.reason}\ndeclared {result.declared}: {result.declared_why}\n"
            f"command: {result.command}\nfolder: {run_folder()}"
        )


def run_folder() -> Path:
    """Of this process: the workers of one call of pytest-xdist have names of their own."""
    call = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))[:8]
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    return RUNS / "-".join(part for part in (_STARTED, "pytest", call, worker) if part)
