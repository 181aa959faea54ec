"""The command line beyond one host: `--executor ray` on a made-up cluster, and `--shard`."""

import socket

import pytest
from test_runner import Table, good, transcript

from harness import cli, run
from harness.chosen import read_chosen
from harness.executors.site import Site
from harness.hardware import Hardware
from harness.ledger import read
from harness.need import Room

pytest.importorskip("ray")
from harness.executors import ray as fleet

EXECUTOR = fleet.RayExecutor
HERE = Hardware(family="cpu", name="of the driver", count=2, memory_bytes=2**30)
THERE = Hardware(family="cpu", name="of the hosts", count=64, memory_bytes=2**40, hosts=3)
H200 = Hardware(family="hopper", name="H200", count=8, memory_bytes=2**37, compute_capability="9.0", hosts=2)


class Cluster(Table):
    """Three hosts with a CPU, or two with GPUs, that answer well at once."""

    asked: tuple = ()
    has = THERE
    runtime = "process"
    hosts = 3
    width = 7
    largest = Room(cores=64, memory_bytes=2**40)
    site = Site(
        hardware=("cpu (3 hosts of …)",), kinds=("cpu (of the hosts)",), versions=(("cpu", (("vllm", "9.9"),)),)
    )  # fmt: skip

    def __init__(self, *arguments):
        super().__init__()
        Cluster.asked = arguments

    @property
    def hardware(self):
        return [self.has]

    def attempt(self, cell, folder, follow, ask=True):
        super().attempt(cell, folder, follow, ask)
        return good(cell, transcript=transcript(cell), proofs=())


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(fleet, "RayExecutor", Cluster)
    monkeypatch.setattr(run, "_reporter", lambda: lambda run_dir: run_dir / "index.html")
    monkeypatch.setattr(run, "record_cards", lambda run_dir, results: None)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(cli, "RUNS", tmp_path / "runs")

    def call(*argv):
        status = cli.main(argv, found=lambda: [HERE])
        told = capsys.readouterr()
        return status, told.out, told.err

    return call


def test_a_run_on_a_cluster_is_planned_for_its_hosts_and_records_them(call, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "host_memory", lambda: 2**31)
    assert "needs 3.2 GiB of memory" in call("--suite", "smoke", "--list", "-v")[1]
    status, out, _ = call(
        "--suite", "smoke", "--executor", "ray", "--address", "head:6379", "--run-dir", str(tmp_path / "run")
    )  # fmt: skip
    assert Cluster.asked == ("head:6379", "process")
    # the driver's 2 GiB would hold no cell of four ranks; the hosts' 1 TiB does
    assert "cells: 4, of which 4 run here and 0 are skipped; jobs: 7" in out and "executor: ray, 3 hosts" in out
    events, _ = read(tmp_path / "run" / "ledger.ndjson")
    assert events[0]["hardware"] == ["cpu (3 hosts of …)"]
    assert events[0]["setting"]["hardware"] == ["cpu (of the hosts)"]
    results = [event["result"] for event in events if event["event"] == "result"]
    assert len(results) == 4 and all(result["versions"] == [["vllm", "9.9"]] for result in results)
    assert status in (0, 1)  # the made-up answers prove no path


def test_cells_that_only_several_hosts_hold_are_planned_and_measured_ones_are_not(call, monkeypatch):
    monkeypatch.setattr(Cluster, "has", H200)
    _, out, _ = call("--suite", "perf", "--executor", "ray", "--list", "-v")
    assert "a measured cell runs where its harness does" in out


def test_a_cluster_that_cannot_be_had_is_bad_usage(call, monkeypatch):
    def none(*arguments):
        raise fleet.ClusterError("--executor ray: no such host; start one: ray start --head")

    monkeypatch.setattr(fleet, "RayExecutor", none)
    status, _, err = call("--suite", "smoke", "--executor", "ray", "--list")
    assert status == 2 and "ray start --head" in err
    status, _, err = call("--suite", "smoke", "--address", "head:6379")
    assert status == 2 and "--address goes with --executor ray" in err


def test_shards_are_parts_of_one_plan_and_say_what_all_expect(call, tmp_path):
    words = ("--suite", "standard-tp", "--hardware", "cpu", "--executor", "ray")
    parts = []
    for part in (1, 2):
        folder = tmp_path / str(part)
        _, out, _ = call(*words, "--shard", f"{part}/2", "--run-dir", str(folder))
        chosen = read_chosen(folder)
        assert chosen.shard == f"{part}/2" and f"shard {part}/2 of {len(chosen.expected)} cells" in out
        events, _ = read(folder / "ledger.ndjson")
        assert tuple(events[0]["planned"]) == chosen.cells
        parts.append(chosen)
    assert parts[0].expected == parts[1].expected
    assert set(parts[0].cells) | set(parts[1].cells) == set(parts[0].expected)
    assert set(parts[0].cells) != set(parts[0].expected) != set(parts[1].cells)


def test_a_shard_that_was_cut_off_goes_on_as_it_was_cut(call, tmp_path):
    words = ("--suite", "smoke", "--executor", "ray")
    call(*words, "--shard", "1/2", "--run-dir", str(tmp_path / "run"))
    before = read_chosen(tmp_path / "run")
    status, out, _ = call("--resume", str(tmp_path / "run"), "--executor", "ray")
    assert status in (0, 1) and f"cells: {len(before.cells)}," in out


@pytest.mark.parametrize("text", ["0/2", "3/2", "half"])
def test_bad_shards_are_2(call, text):
    status, _, err = call("--suite", "smoke", "--shard", text)
    assert status == 2 and "allowed: I/N" in err


@pytest.fixture
def no_cluster(monkeypatch):
    """Ray as it is on a host without one; returns the addresses that it was asked for."""
    asked = []

    def init(address, **options):
        asked.append(address)
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(fleet.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(fleet.ray, "init", init)
    return asked


def test_without_an_address_a_cluster_is_joined_and_none_is_started(no_cluster):
    with pytest.raises(
        fleet.ClusterError, match="Could not find any running Ray instance; start one: ray start --head"
    ):
        EXECUTOR()
    assert no_cluster == ["auto"]


def test_nobody_at_the_address_is_said_at_once(no_cluster):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for asked in (address, f"ray://{address}"):
            with pytest.raises(fleet.ClusterError, match=f"nobody answers at {asked} .*; start one"):
                EXECUTOR(asked)
    assert no_cluster == []
