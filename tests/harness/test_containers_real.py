"""Real vLLM cells of each mode in containers of `images/cpu`, and the same through processes: equal answers."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stand_in
from docker_daemon import cli, daemon
from same_answers import same

from harness import images
from harness.cell import Cell, Mode
from harness.executors.local import LocalExecutor
from harness.lease import Host
from harness.matrix import PlannedCell, baseline_of
from harness.need import Room, host_memory
from harness.result import CellResult
from harness.runner import run
from harness.server.containers import connect
from harness.server.place import make_place
from harness.transcript import Transcript
from harness.verdict import Verdict

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

SERVE = (
    ("dtype", "float32"), ("max-model-len", 2048), ("enforce-eager", True), ("kv-cache-memory-bytes", 2**26),
    ("max-num-seqs", 16), ("seed", 0),
)  # fmt: skip
GQA = {"model": "recipe:llama-k4", "backend": "HELIX_CPU", "serve": (*SERVE, ("block-size", 32))}
MLA = {"model": "recipe:deepseek-v2", "backend": "HELIX_CPU_MLA", "serve": (*SERVE, ("block-size", 16))}
COMMON = {"hardware": "cpu", "tp": 2, "kvp": 2, "interleave": 16, "comm": "a2a", "workload": "smoke"}
CELLS = (
    Cell(mode=Mode.HELIX_GQA, helix=(("allow_gqa_tpa1", True),), **GQA, **COMMON),
    Cell(mode=Mode.HELIX_MLA, **MLA, **COMMON),
    Cell(mode=Mode.STANDARD_DCP, **MLA, **COMMON),
)


@pytest.fixture(scope="module")
def image():
    with daemon() as running:
        client, made = connect(), []
        if "cpu" not in images.current(client):
            if not client.images.list(stand_in.WHOLE):
                stand_in.make("whole", stand_in.WHOLE, cli())
                made.append(stand_in.WHOLE)
            made.append(
                images.build(client, images.make_plan(client, "cpu", stand_in.WHOLE, arguments=[("APT", "")])).digest
            )
        yield images.current(client)["cpu"]
        assert client.containers.list(all=True, filters={"label": "helix.guard"}) == []
        if running.process is None:  # somebody else's daemon is left as it was
            for name in reversed(made):
                client.images.remove(name, force=True)


def plan() -> list[PlannedCell]:
    """The cells with their baselines, of which those are references here."""
    bases = dict.fromkeys(map(baseline_of, CELLS))
    common = {"suites": ("test",), "declared": Verdict.PASS, "declared_why": ""}
    made = [PlannedCell(cell=base, **common) for base in bases]
    return made + [PlannedCell(cell=cell, baseline=baseline_of(cell), **common) for cell in CELLS]


#: Of vLLM's own line on what it was given: these differ by place, by port and by nonce.
OWN = re.compile(r"'(?:host|port|model|model_tag|served_model_name|proof_dir)': (?:\[[^]]*\]|'[^']*'|\d+),? ?")


def both(tmp_path) -> dict[str, list[CellResult]]:
    """The plan in containers and, at the same time, in processes: results by runtime. Most of it is one core's work."""
    room = Room(cores=2 * COMMON["tp"], memory_bytes=host_memory())
    with ThreadPoolExecutor(2) as pool:
        runs = {}
        for runtime in ("docker", "process"):
            place = make_place(runtime)
            executor = LocalExecutor(place=place, host=Host(room))
            runs[runtime] = pool.submit(
                run, plan(), run_dir=tmp_path / runtime, runtime=runtime, executor=executor, localise=False
            )
        return {runtime: running.result() for runtime, running in runs.items()}


def test_each_mode_says_the_same_in_a_container_and_in_a_process(image, tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_LEASES", str(tmp_path / "leases"))
    found = both(tmp_path)
    for results in found.values():
        assert {str(result.cell.mode) for result in results} == {str(mode) for mode in Mode}
        assert {result.cell.id: result.reason for result in results if result.verdict is not Verdict.PASS} == {}
    assert dict(found["docker"][0].versions)["image cpu"] == image.digest.removeprefix("sha256:")[:12]
    assert [result.command for result in found["docker"]] == [result.command for result in found["process"]]
    transcripts = sorted(tmp_path.glob("docker/cells/*/transcript.json"))
    assert len(transcripts) == len(CELLS) + 2
    for path in transcripts:
        other = tmp_path / "process" / path.relative_to(tmp_path / "docker")
        same(Transcript.load(path), Transcript.load(other))
        assert given(path.with_name("server.log")) == given(other.with_name("server.log"))


def given(log: Path) -> str:
    """The arguments as the server itself understood them, but for what is of its place."""
    told = next(line for line in log.read_text().splitlines() if "non-default args: " in line)
    return OWN.sub("", told.partition("non-default args: ")[2])
