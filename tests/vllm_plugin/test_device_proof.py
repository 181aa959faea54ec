"""Counters on a device and what they are copied to; on CPU tensors, through the code that runs on a GPU."""

import time
from types import SimpleNamespace

import pytest
import torch

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
    assert counters.values.data_ptr() == before


def test_a_graph_for_any_batch_counts_what_the_step_holds():
    """What is added is read when a graph is replayed, so the same addition counts a decode step, then a prefill."""
    proof = ProofWriter(None, 0)
    counters = proof.count_on(torch.device("cpu"))
    before = counters.step.data_ptr()
    proof.step_is(torch.tensor(True))  # no graph adds it: nothing is written
    assert not counters.step.any()
    proof.ran("decode", captured=True)
    proof.ran("prefill", captured=True)  # the capture: nothing is known of the step yet
    for prefill in (False, False, True):
        proof.step_is(torch.tensor(prefill))
        counters.values.add_(counters.step)  # what a replay does
    counted = {name: value for name, value in zip(counters.names, counters.read(), strict=True) if value}
    assert counted == {
        "decode_attention": 3, "decode_combine": 3, "prefill_attention": 1, "prefill_combine": 1, "replayed_combine": 4,
    }  # fmt: skip
    assert counters.step.data_ptr() == before


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


def captured(attention):
    """(proof, counters, graph) of `attention(proof)`, captured on the device; nothing is counted yet."""
    proof = ProofWriter(None, 0)
    counters = proof.count_on(torch.device("cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(proof)
    counters.reset()
    return proof, counters, graph


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replay_of_a_graph_for_any_batch_counts_the_step():
    proof, counters, graph = captured(lambda proof: proof.ran("prefill", captured=True))
    for prefill in (False, True, False):
        proof.step_is(torch.tensor(prefill, device="cuda"))
        graph.replay()
    torch.cuda.synchronize()
    counted = dict(zip(counters.names, counters.read(), strict=True))
    assert (counted["decode_combine"], counted["prefill_combine"], counted["replayed_combine"]) == (2, 1, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_of_a_graph_are_counted():
    _, counters, graph = captured(lambda proof: [proof.ran("decode") for _ in range(3)])
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    counted = dict(zip(counters.names, counters.read(), strict=True))
    assert (counted["decode_attention"], counted["decode_combine"], counted["prefill_attention"]) == (15, 15, 0)


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
