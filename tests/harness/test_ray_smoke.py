"""Real vLLM on a real Ray cluster of three nodes on this host: the smoke suite while a node dies, and one server over
two nodes."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from same_answers import same
from test_real_servers import helix, planned

from harness.hardware import cpu
from harness.ledger import read
from harness.matrix import baseline_of, expand
from harness.runner import folder_name, run
from harness.server.place import Processes
from harness.suite import ROOT, load_all
from harness.transcript import Transcript
from harness.verdict import Verdict

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

QUIET = {"progress": lambda line: None, "localise": False}


class Noted(Processes):
    """Real servers; each start is a line `node folder` in a file of its cell."""

    def __init__(self, told: Path):
        self.told = told

    def launch(self, cell, folder, port, gpus):
        with (self.told / f"{cell.key}.txt").open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()} {folder}\n")
        return super().launch(cell, folder, port, gpus)

    def starts(self, cell) -> list[list[str]]:
        file = self.told / f"{cell.key}.txt"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def nodes():
    """A cluster whose nodes say by a custom resource, as older clusters do, that they are for CPU cells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")  # `Noted` is here
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def cluster(nodes):
    """Three nodes that live, beside the head."""
    while len(nodes.list_all_nodes()) < 4:
        nodes.add_node(num_cpus=4, object_store_memory=80 * 2**20, resources={"cpu": 1})
    nodes.wait_for_nodes()
    return nodes


def transcript(run_dir: Path, cell) -> Transcript:
    return Transcript.load(run_dir / "cells" / folder_name(cell) / "transcript.json")


def running(folder: str) -> list[psutil.Process]:
    """Processes that write the log of the server that was started in `folder`; a forked one has no telling command."""
    return [process for process in psutil.process_iter() if folder in log_of(process.pid)]


def log_of(pid: int) -> str:
    """What a process's standard output is; empty when it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return ""


def test_smoke_on_three_nodes_of_which_one_is_killed_says_what_local_says(cluster, tmp_path):
    from harness.executors.ray import RayExecutor

    plan = expand(load_all(["smoke"]), [cpu()])
    victim = next(item.cell for item in plan if item.cell.mode.helix and item.declared is Verdict.PASS)
    (tmp_path / "told").mkdir()
    place = Noted(tmp_path / "told")
    executor = RayExecutor(cluster.address, place=place)
    assert executor.hosts == 3
    killed = []

    def kill():
        while not (started := place.starts(victim)) or not running(started[0][1]):
            time.sleep(0.1)
        node = next(node for node in cluster.list_all_nodes() if node.node_id == started[0][0])
        cluster.remove_node(node, allow_graceful=False)
        killed.append(started[0][0])

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = run(plan, run_dir=tmp_path / "ray", jobs=2, executor=executor, site=executor.site, **QUIET)
    killer.join(20)
    expected = run(plan, run_dir=tmp_path / "local", jobs=2, **QUIET)

    assert [one.verdict for one in found] == [item.declared for item in plan] == [one.verdict for one in expected]
    asked = [item.cell for item in plan if item.declared is Verdict.PASS]
    for cell in asked:
        same(transcript(tmp_path / "ray", cell), transcript(tmp_path / "local", cell))
    (first, folder), (second, _) = place.starts(victim)
    assert killed == [first] and second != first and running(folder) == []
    events, _ = read(tmp_path / "ray" / "ledger.ndjson")
    tries = [event for event in events if event["event"] == "attempt" and event["id"] == victim.id]
    assert [event["cause"] for event in tries] == ["killed", None]
    # what is known of a cell does not hang on where it ran
    for here, there in zip(expected, found, strict=True):
        assert (here.kv_cache_tokens, len(here.proof)) == (there.kv_cache_tokens, len(there.proof))


@pytest.mark.nightly
def test_a_server_spans_two_nodes_by_vllm_s_own_start_and_every_rank_proves_its_path(cluster, tmp_path):
    from harness.executors.ray import RayExecutor

    base, cell = baseline_of(helix()), helix()
    executor = RayExecutor(cluster.address, cpu_ranks=1)
    found = run(
        [planned(base), planned(cell)], run_dir=tmp_path, executor=executor, site=executor.site, **QUIET
    )  # fmt: skip
    assert [(one.verdict, one.reason) for one in found if one.verdict is not Verdict.PASS] == []
    assert [proof["rank"] for proof in found[1].proof] == [0, 1]
    folder = tmp_path / "cells" / folder_name(cell)
    for one in (base, cell):
        log = (tmp_path / "cells" / folder_name(one) / "host-1" / "server.log").read_text()
        assert "headless" in log and "rank 1 in world size 2" in log
    assert len(list((folder / "host-1" / "proof").iterdir())) >= 1
