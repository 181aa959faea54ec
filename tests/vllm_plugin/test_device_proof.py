"""Counters on a device and what they are copied to; on CPU tensors, through the code that runs on a GPU."""

import time
from types import SimpleNamespace

import pytest
import torch
from recorded_graph import RecordedGraph

from helix_runtime import capture_id
from helix_runtime.device_counters import DeviceCounters, Publisher
from helix_runtime.proof import COUNTERS, ProofWriter, RankProof, read_proofs


def record(**changes) -> RankProof:
    usual = {
        "rank": 0, "tp": 2, "kvp": 2, "tpa": 1, "kvp_rank": 0, "tpa_rank": 0, "helix": True, "backend": "B",
        "impl": "I",
        "combine": "a2a", "combine_impl": "f", "group_size": 2, "group_ranks": (0, 1), "interleave": 1, "lse_base": "e",
        "model_runner": "r", "vllm_version": "0.32.0", "self_test": "ok",
    }  # fmt: skip
    return RankProof(**{**usual, **changes})


def test_counters_add_numbers_and_tensors():
    counters = DeviceCounters("cpu", ("a", "b", "c"), together=(("a", "c"),))
    counters.bump("a", "c")
    counters.bump("b")
    counters.add("b", 3)
    counters.add("b", torch.tensor([True, False, True]).sum())
    assert counters.read() == [1, 6, 1]
    counters.reset()
    assert counters.read() == [0, 0, 0]


def test_bumping_allocates_nothing_and_keeps_its_address():
    """What a captured graph would add to must still be there when it is replayed."""
    counters = DeviceCounters("cpu", ("a", "b"), together=(("a", "b"),))
    before = counters.values.data_ptr()
    with pytest.raises(KeyError):
        counters.bump("b", "a")  # an increment that was not made beforehand
    counters.bump("a", "b")
    assert counters.values.data_ptr() == before and counters.read() == [1, 1]


def test_what_runs_outside_of_captures_is_counted_without_the_device():
    """A launch a layer would be felt where layers run one by one; a number on the host is not."""
    proof, counters = recording()
    proof.ran("decode")
    proof.overlapped()
    assert not counters.values.any()
    assert read(counters) == {"decode_attention": 1, "decode_combine": 1, "overlapped_combine": 1}


def test_nothing_is_written_for_the_step_where_no_graph_adds_it():
    proof, counters = recording()
    before = counters.step.data_ptr()
    proof.step_is(torch.tensor(True))
    assert not counters.step.any()
    captured(proof, RecordedGraph(), "prefill")
    proof.step_is(torch.tensor(True))
    assert counters.step.any() and counters.step.data_ptr() == before


def test_the_tokens_of_a_step_say_what_its_graphs_count(counted):
    """One new token a request is decode, padding or not; a request with three is not."""
    pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")
    from helix_runtime.vllm_plugin.device_proof import count_tokens

    for starts, phase in (([0, 1, 2, 2], "decode"), ([0, 3, 4, 4], "prefill")):
        proof = ProofWriter(None, 0)
        counters = proof.count_on(torch.device("cpu"))
        proof.ran("prefill", captured=True)
        context = SimpleNamespace(proof=proof, interleave=2, kvp=2, kvp_rank=0)
        count_tokens(context, torch.tensor([-1] * 4), torch.tensor(starts), torch.tensor([0, 1, 2, 3]))
        counts = {name for name, value in zip(COUNTERS, counters.step.tolist(), strict=True) if value}
        assert counts == {f"{phase}_attention", f"{phase}_combine", "replayed_combine"}


def test_what_is_known_later_is_written_again(tmp_path):
    writer = ProofWriter(tmp_path, 0)
    writer.amend(cudagraph_mode="FULL")  # nobody yet
    writer.identify(record())
    writer.amend(cudagraph_mode="FULL_AND_PIECEWISE", graphs_captured=10)
    (proof,) = read_proofs(tmp_path)
    assert (proof.cudagraph_mode, proof.graphs_captured, proof.backend) == ("FULL_AND_PIECEWISE", 10, "B")


def recording() -> tuple[ProofWriter, DeviceCounters]:
    """A proof whose captures are `RecordedGraph`s."""
    proof = ProofWriter(None, 0)
    return proof, proof.count_on(torch.device("cpu"), capture_id=lambda: RecordedGraph.capturing)


def captured(proof: ProofWriter, graph, *phases: str):
    """`graph`, after a layer of each of `phases` was captured into it."""
    with graph if isinstance(graph, RecordedGraph) else torch.cuda.graph(graph):
        for phase in phases:
            proof.ran(phase, captured=True)
    return graph


def read(counters: DeviceCounters) -> dict[str, int]:
    """What is not 0, once the device is done."""
    if counters.values.is_cuda:
        torch.cuda.synchronize()
    return {name: value for name, value in zip(counters.names, counters.read(), strict=True) if value}


def attended(decode: int = 0, prefill: int = 0) -> dict[str, int]:
    """Counters after so many replayed layers."""
    counts = {
        "decode_attention": decode, "decode_combine": decode, "prefill_attention": prefill, "prefill_combine": prefill,
        "replayed_combine": decode + prefill,
    }  # fmt: skip
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("phases, kernels", [(["decode"] * 3, 1), (["prefill"] * 3, 1), (["decode", "prefill"] * 3, 2)])
def test_a_graph_adds_once_whatever_its_layers(phases, kernels):
    proof, counters = recording()
    graph = captured(proof, RecordedGraph(), *phases)
    assert len(graph.kernels) == kernels and not read(counters)
    proof.ran("decode")  # eager: at once
    assert read(counters) == {"decode_attention": 1, "decode_combine": 1}


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def graphs(request):
    """(proof, counters, class of its graphs): emulated on the CPU, and where there is a device on it."""
    if request.param == "recorded":
        return *recording(), RecordedGraph
    proof = ProofWriter(None, 0)
    return proof, proof.count_on(torch.device("cuda")), torch.cuda.CUDAGraph


def test_replays_of_a_graph_are_counted(graphs):
    proof, counters, graph_class = graphs
    graph = captured(proof, graph_class(), "decode", "decode", "decode")
    graph.replay()
    assert not read(counters)  # its row is empty until `flush`: captures are told apart, no layer added for itself
    counters.flush()
    counters.reset()
    for _ in range(5):
        graph.replay()
    assert read(counters) == attended(decode=15)


def test_each_graph_counts_its_own_layers(graphs):
    proof, counters, graph_class = graphs
    proof.ran("decode")  # warming up
    two = captured(proof, graph_class(), "decode", "decode")
    captured(proof, graph_class(), "decode", "decode")  # thrown away
    three = captured(proof, graph_class(), "decode", "decode", "decode")
    counters.flush()
    counters.reset()
    for graph in (two, three, two):
        graph.replay()
    assert read(counters) == attended(decode=7)
    later = captured(proof, graph_class(), "decode")
    counters.flush()
    for graph in (later, two, later, three):
        graph.replay()
    assert read(counters) == attended(decode=7 + 7)


def test_a_replay_of_a_graph_for_any_batch_counts_the_step(graphs):
    """… and one layer of decode beside its two for any batch counts as decode always."""
    proof, counters, graph_class = graphs
    graph = captured(proof, graph_class(), "prefill", "prefill")
    mixed = captured(proof, graph_class(), "prefill", "decode", "prefill")
    counters.flush()
    for prefill in (False, True, False):
        proof.step_is(torch.tensor(prefill, device=counters.values.device))
        graph.replay()
    assert read(counters) == attended(decode=4, prefill=2)
    proof.step_is(torch.tensor(True, device=counters.values.device))
    mixed.replay()
    assert read(counters) == attended(decode=4 + 1, prefill=2 + 2)


def test_nothing_is_copied_during_a_capture(graphs):
    proof, counters, graph_class = graphs
    first, second = graph_class(), graph_class()
    captured(proof, first, "decode")
    with second if isinstance(second, RecordedGraph) else torch.cuda.graph(second):
        proof.ran("decode", captured=True)
        counters.flush()
        proof.ran("decode", captured=True)
    counters.flush()
    first.replay()
    second.replay()
    assert read(counters) == attended(decode=3)


def test_tokens_of_a_step_let_later_graphs_count(counted):
    from helix_runtime.vllm_plugin.device_proof import count_tokens

    proof, counters = recording()
    graph = captured(proof, RecordedGraph(), "decode", "decode")
    context = SimpleNamespace(proof=proof, interleave=2, kvp=1, kvp_rank=0)
    count_tokens(context, torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0]))
    graph.replay()
    assert read(counters) == {**attended(decode=2), "local_tokens": 1, "global_tokens": 1}


def test_with_no_row_left_every_layer_adds_for_itself(monkeypatch, caplog):
    monkeypatch.setattr("helix_runtime.device_counters.GRAPHS", 1)
    proof, counters = recording()
    made = [captured(proof, RecordedGraph(), phase, phase) for phase in ("decode", "decode", "prefill")]
    counters.flush()
    assert [len(graph.kernels) for graph in made] == [1, 2, 2]
    assert len(caplog.records) == 1 and "more than 1 CUDA graphs" in caplog.text
    proof.step_is(torch.tensor(True))
    for graph in made:
        graph.replay()
    assert read(counters) == attended(decode=4, prefill=2)


def test_captures_that_cannot_be_told_apart_add_for_every_layer(monkeypatch, caplog):
    """The driver's library lacks the function, then answers with an error."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(capture_id.ctypes, "CDLL", lambda name: SimpleNamespace(__name__=name))
    capture_id._warn.cache_clear()
    proof = ProofWriter(None, 0)
    proof.count_on(torch.device("cpu"), capture_id=capture_id.current_capture)
    for query in (capture_id._query.__wrapped__, lambda: lambda *_: 401):
        monkeypatch.setattr(capture_id, "_query", query)
        assert len(captured(proof, RecordedGraph(), "decode", "decode").kernels) == 2
    lacks, failed = (record.message for record in caplog.records)  # once each
    assert "no attribute 'cuStreamGetCaptureInfo_v2'" in lacks and "returned 401" in failed
    assert lacks.endswith("the proof adds once a layer") and failed.endswith("the proof adds once a layer")


@pytest.mark.gpu
@needs_cuda
def test_the_driver_numbers_captures():
    seen, side = [], torch.cuda.Stream()
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        assert capture_id.current_capture() is None
        with torch.cuda.graph(graph):
            torch.zeros(1, device="cuda").add_(1)
            seen.append(capture_id.current_capture())
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # forked: the same capture
                assert capture_id.current_capture() == seen[-1]
            torch.cuda.current_stream().wait_stream(side)
    assert None not in seen and len(set(seen)) == 2


def test_a_writer_counts_on_its_device_and_publishes(tmp_path):
    writer = ProofWriter(tmp_path, 0)
    writer.identify(record(on_device=True))
    counters = writer.count_on(torch.device("cpu"))
    writer.ran("decode")
    writer.ran("prefill", combined=False)
    writer.count("local_tokens", torch.tensor(5))
    publisher = Publisher(counters, writer.publish, seconds=0.01)
    publisher.start()
    until = time.monotonic() + 10
    while read_proofs(tmp_path)[0].counters["local_tokens"] != 5 and time.monotonic() < until:
        time.sleep(0.01)
    writer.ran("decode")
    publisher.close()
    counted = {name: value for name, value in read_proofs(tmp_path)[0].counters.items() if value}
    assert counted == {"decode_attention": 2, "decode_combine": 2, "prefill_attention": 1, "local_tokens": 5}


def test_a_writer_without_a_device_counts_in_place(tmp_path):
    writer = ProofWriter(tmp_path, 0)
    writer.identify(record())
    writer.ran("decode", combined=False)
    writer.count("global_tokens", torch.tensor(4))
    counters = read_proofs(tmp_path)[0].counters
    assert (counters["decode_attention"], counters["decode_combine"], counters["global_tokens"]) == (1, 0, 4)


def test_records_of_before_are_still_read(tmp_path):
    """A proof without newer counters, as committed evidence holds them."""
    writer = ProofWriter(tmp_path, 0)
    writer.identify(record())
    path = tmp_path / "rank0.counters"
    path.write_bytes(path.read_bytes()[: 8 * 7])
    assert set(read_proofs(tmp_path)[0].counters) == set(COUNTERS[:7])


@pytest.fixture
def counted():
    pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")
    from helix_runtime.vllm_plugin.device_proof import count_tokens

    def run(kvp_rank: int, slots: list[int], starts: list[int], positions: list[int]) -> dict[str, int]:
        proof = ProofWriter(None, 0)
        counters = proof.count_on(torch.device("cpu"))
        context = SimpleNamespace(proof=proof, interleave=2, kvp=2, kvp_rank=kvp_rank)
        count_tokens(context, torch.tensor(slots), torch.tensor(starts), torch.tensor(positions))
        return {name: value for name, value in zip(COUNTERS, counters.read(), strict=True) if value}

    return run


def test_padding_is_not_counted(counted):
    """Two requests decode at positions 5 and 1 (interleave 2), in a graph for four: slots and starts are padded."""
    padded = [0, 1, 2, 2, 2]
    # Rank 1 owns positions 2, 3, 6, 7: neither token; the second request's shard is empty there.
    assert counted(1, [-1, -1, -1, -1], padded, [5, 1, 0, 0]) == {"global_tokens": 2, "empty_shard": 1}
    # Rank 0 owns 0, 1, 4, 5: both.
    assert counted(0, [37, 12, -1, -1], padded, [5, 1, 0, 0]) == {"local_tokens": 2, "global_tokens": 2}


def test_tokens_on_the_wrong_rank_are_told(counted):
    """Position 5 belongs to rank 0 and position 2 to rank 1; the padding after them to no one."""
    wrong = counted(0, [-1, 12, -1, -1], [0, 1, 2, 2, 2], [5, 2, 0, 0])
    assert wrong == {"local_tokens": 1, "global_tokens": 2, "misplaced_tokens": 2}


def test_a_prefill_and_a_decode(counted):
    """A prompt of 3 tokens and a decode at position 2, on rank 1."""
    assert counted(1, [-1, -1, 8, 9], [0, 3, 4], [0, 1, 2, 2]) == {"local_tokens": 2, "global_tokens": 4}


def test_the_ranks_of_a_group_own_every_token_once(counted):
    from helix_runtime.sharding import slot_mapping

    lengths, new = [9, 1, 30], [1, 1, 4]
    positions = torch.cat([torch.arange(length - n, length) for length, n in zip(lengths, new, strict=True)])
    starts = torch.tensor([0, 1, 2, 6])
    table = torch.arange(3 * 8).view(3, 8)
    local = []
    for rank in range(2):
        slots = slot_mapping(positions, table, starts, block_size=4, kvp=2, kvp_rank=rank, interleave=2)
        found = counted(rank, slots.tolist(), starts.tolist(), positions.tolist())
        assert found["global_tokens"] == 6
        local.append(found.get("local_tokens", 0))
    assert sum(local) == 6


def test_v2_is_told_from_v1():
    pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")
    from helix_runtime.vllm_plugin.device_proof import runs_v2

    made = type("GPUModelRunner", (), {"__module__": "vllm.v1.worker.gpu.model_runner"})
    old = type("GPUModelRunner", (), {"__module__": "vllm.v1.worker.gpu_model_runner"})
    assert runs_v2(type("Mine", (made,), {})()) and not runs_v2(old())
