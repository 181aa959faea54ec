"""A real Ray cluster of three nodes on this host, with stub servers: placement, a lost node, the same rows as local."""

import json
import threading
import time
from pathlib import Path

import pytest
from test_runner import BASE, HELIX, OTHER, planned
from test_server import launch

from harness.executors.local import LocalExecutor
from harness.lease import Host
from harness.ledger import read
from harness.need import Room
from harness.runner import run
from harness.server.place import Processes
from harness.server.process import Limits
from harness.transcript import Transcript
from harness.verdict import Verdict

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.server, pytest.mark.timeout(280)]

LIMITS = Limits(start=60, stop=0.5)
ROOM = Room(cores=64, memory_bytes=2**40)
THIRD = HELIX.model_copy(update={"interleave": 32})
PLAN = [planned(cell) for cell in (BASE, HELIX, OTHER, THIRD)]
QUIET = {"progress": lambda line: None, "localise": False}


class Stubs(Processes):
    """Stub servers. The first attempt at `slow` hangs at its start, having written its node's id into `told`."""

    def __init__(self, told: Path, slow: str = ""):
        self.told, self.slow = told, slow

    def launch(self, cell, folder, port, gpus):
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
        with (self.told / f"{cell.key}.txt").open("a") as file:
            file.write(f"{node}\n")
        hangs = cell.key == self.slow and len(self.nodes(cell)) == 1
        return launch("silent" if hangs else "well", port).model_copy(update={"proof_dir": folder / "proof"})

    def nodes(self, cell) -> list[str]:
        file = self.told / f"{cell.key}.txt"
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the workers take `Stubs` from here
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    for number in range(3):
        made.add_node(
            num_cpus=2, object_store_memory=80 * 2**20, labels={"hardware": "cpu"}, resources={f"n{number}": 1}
        )
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def answers(run_dir: Path, cell) -> tuple:
    (file,) = (run_dir / "cells").glob(f"*{cell.key[:8]}/transcript.json")
    return Transcript.load(file).answers


def test_cells_run_on_nodes_one_is_killed_and_the_rows_are_those_of_local(cluster, tmp_path, monkeypatch):
    from harness.executors import census
    from harness.executors.ray import RayExecutor

    told = tmp_path / "told"
    told.mkdir()
    place = Stubs(told, slow=OTHER.key)
    executor = RayExecutor(cluster.address, limits=LIMITS, room=ROOM, place=place)
    assert executor.width == 3 and {device.family for device in executor.hardware} == {"cpu"}
    killed, at_first = [], [dict(node) for node in ray.nodes()]

    def kill():
        while not (at := place.nodes(OTHER)):
            time.sleep(0.1)
        node = next(node for node in cluster.list_all_nodes() if node.node_id == at[0])
        cluster.remove_node(node, allow_graceful=False)
        killed.append(at[0])

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = run(PLAN, run_dir=tmp_path / "ray", jobs=3, executor=executor, site=executor.site, **QUIET)
    killer.join(20)

    assert [one.reason for one in found if one.verdict is Verdict.ERROR] == []
    local = LocalExecutor(LIMITS, Stubs(tmp_path), Host(ROOM))
    expected = run(PLAN, run_dir=tmp_path / "local", executor=local, **QUIET)
    assert [one.verdict for one in found] == [one.verdict for one in expected]
    for one in PLAN:  # a server also counts what it generated for a client that hung up, which differs by the moment
        assert answers(tmp_path / "ray", one.cell) == answers(tmp_path / "local", one.cell)
    nodes = {node for cell in (BASE, HELIX, OTHER, THIRD) for node in place.nodes(cell)}
    assert len(nodes) > 1, "all cells ran on one node"
    first, second = place.nodes(OTHER)
    assert killed == [first] and second != first
    events, _ = read(tmp_path / "ray" / "ledger.ndjson")
    tries = [event for event in events if event["event"] == "attempt" and event["id"] == OTHER.id]
    assert [event["cause"] for event in tries] == ["killed", None] and "host was lost" in tries[0]["reason"]
    assert "an attempt before was lost to infrastructure" in found[2].reason

    # a host lost a moment ago, which the cluster still lists as living, is not waited for and not used
    with monkeypatch.context() as patch:
        patch.setattr(census.ray, "nodes", lambda: at_first)
        assert len(census.Census("process").living()) == 2

    # a driver that died after two results goes on with the others, through a cluster executor of its own
    ledger = tmp_path / "ray" / "ledger.ndjson"
    lines = ledger.read_text().splitlines(keepends=True)
    second = [number for number, line in enumerate(lines) if json.loads(line)["event"] == "result"][1]
    ledger.write_text("".join(lines[: second + 1]))
    before = {cell.key: len(place.nodes(cell)) for cell in (BASE, HELIX, OTHER, THIRD)}
    next_driver = RayExecutor(cluster.address, limits=LIMITS, room=ROOM, place=place)
    assert next_driver.site.kinds == executor.site.kinds and next_driver.hosts == 2
    again = run(PLAN, run_dir=tmp_path / "ray", executor=next_driver, resume=True, site=next_driver.site, **QUIET)
    assert [one.verdict for one in again] == [one.verdict for one in expected]
    started = [cell for cell in (BASE, HELIX, OTHER, THIRD) if len(place.nodes(cell)) > before[cell.key]]
    assert len(started) == 2

    # a family whose last host is lost ends with that as its reason, and the run ends
    for node in cluster.list_all_nodes():
        if node is not cluster.head_node:
            cluster.remove_node(node, allow_graceful=False)
    lost = run(PLAN[:2], run_dir=tmp_path / "lost", executor=next_driver, site=next_driver.site, **QUIET)
    assert [one.verdict for one in lost] == [Verdict.ERROR] * 2
    assert lost[0].reason.endswith("no living host of the cluster has cpu")

    # a host that joins is asked, and used
    cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20, labels={"hardware": "cpu"})
    until = time.monotonic() + 60
    while next_driver.hosts == 0 and time.monotonic() < until:
        time.sleep(0.5)
    (joined,) = run(PLAN[:1], run_dir=tmp_path / "joined", executor=next_driver, site=next_driver.site, **QUIET)
    assert joined.verdict is Verdict.PASS and len(place.nodes(BASE)) == before[BASE.key] + 1
