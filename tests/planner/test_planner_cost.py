"""Costs and capacities against numbers worked out by hand."""

import numpy as np
import pytest

from benchmarks.planner import seconds
from helix_runtime.layout import resolve_layout
from helix_runtime.planner.calibration import IDEAL
from helix_runtime.planner.capacity import RESERVE, UTILISATION, capacity, recomputed
from helix_runtime.planner.cost import Workload, cached_bytes, decode, hop_b, latency, prefill, stored_bytes
from helix_runtime.planner.grid import A2A, NONE, Grid, entry
from helix_runtime.planner.hardware import PlannerError, load_gpu, named_gpu
from helix_runtime.planner.weights import parameters, weights_of
from helix_runtime.shapes import load_shape

GB200 = load_gpu("gb200")
LLAMA = load_shape("meta-llama/Llama-3.1-405B-Instruct")
R1 = load_shape("deepseek-ai/DeepSeek-R1")


def grid_of(shape, tp, kvp=1, helix=None, batch=1, **changes) -> Grid:
    layout = resolve_layout(tp, kvp, **shape.layout_arguments(), helix_mode=kvp > 1 if helix is None else helix)
    return Grid.of([{**entry(layout, changes.pop("q_replicate", False), batch), **changes}])


@pytest.mark.parametrize(
    "name, billions",
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("meta-llama/Llama-3.1-405B-Instruct", 405.9),
        ("Qwen/Qwen3-32B", 32.8),
        ("Qwen/Qwen3-235B-A22B", 235.1),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", 15.7),
        ("deepseek-ai/DeepSeek-R1", 671.0),
        ("moonshotai/Kimi-K2-Instruct", 1026.0),
    ],
)
def test_parameters_are_those_that_the_model_is_known_by(name, billions):
    assert parameters(load_shape(name)) / 1e9 == pytest.approx(billions, rel=0.005)


def test_attention_reads_the_papers_bytes():
    """Figure 1's inputs per layer: 2 * ceil(8 / TPA) * 128 * S / KVP * 0.5 bytes a request, 8 requests, 8 TB/s."""
    paper = Workload(LLAMA, 1_000_000, "fp4", "fp4")
    seconds = decode(paper, GB200, IDEAL, grid_of(LLAMA, 8, batch=8)).terms["attention"][0] / LLAMA.num_layers
    assert seconds == pytest.approx(128e-6)
    duplicated = decode(paper, GB200, IDEAL, grid_of(LLAMA, 64, batch=8)).terms["attention"][0] / LLAMA.num_layers
    assert duplicated == pytest.approx(128e-6), "beyond K heads more TP reads no less"
    shared = decode(paper, GB200, IDEAL, grid_of(LLAMA, 64, 8, batch=8)).terms["attention"][0] / LLAMA.num_layers
    assert shared == pytest.approx(16e-6)


def test_helix_reads_query_weights_of_its_tpa_share_and_o_proj_of_its_tp_share():
    paper = Workload(LLAMA, 1, "fp4", "fp4")
    seconds = decode(paper, GB200, IDEAL, grid_of(LLAMA, 64, 8)).terms["attention weights"][0] / LLAMA.num_layers
    hidden = 16384
    elements = hidden * hidden / 8 + 2 * hidden * 128 + hidden * hidden / 64
    assert seconds == pytest.approx(elements * 0.5 / 8e12)


def test_mla_attention_is_one_latent_and_becomes_bound_by_arithmetic():
    """576 values of 2 bytes a token; 128 heads of 576 + 512 multiply-adds a token at 989.5 Tflop/s."""
    h200 = load_gpu("h200")
    work = Workload(R1, 100_000, "bf16", "bf16")
    alone = decode(work, h200, IDEAL, grid_of(R1, 64))
    assert alone.terms["attention"][0] / 61 == pytest.approx(100_000 * 576 * 2 / 4.8e12)
    assert not alone.attention_computes[0]
    shared = decode(work, h200, IDEAL, grid_of(R1, 64, 64))
    assert shared.attention_computes[0], "every rank now computes all 128 heads"
    assert shared.terms["attention"][0] / 61 == pytest.approx(100_000 / 64 * 128 * 2 * (576 + 512) / 989.5e12)


def test_the_exchange_moves_owned_heads_to_each_peer_and_no_more_with_context():
    """B 8, 128 / 64 = 2 heads owned, 7 peers, 128 values of 2 bytes and one fp32 LSE, 900 GB/s; 5.9 µs latency."""
    grid = grid_of(LLAMA, 64, 8, batch=8)
    seconds = [
        decode(Workload(LLAMA, context, "bf16", "bf16"), GB200, IDEAL, grid).terms["exchange"][0] / LLAMA.num_layers
        for context in (1_000, 1_000_000)
    ]
    row = 128 * 2 + 4
    kernels = 8 * 2 * (2 * 8 + 8 + 1) * row / 8e12
    assert seconds[0] == pytest.approx(7 * 8 * 2 * row / 900e9 + 5.9e-6 + kernels)
    assert seconds[1] == seconds[0]


def test_only_gathering_layouts_pay_for_a_gather():
    work = Workload(R1, 1000)
    gathered = decode(work, GB200, IDEAL, grid_of(R1, 8, 8)).terms
    replicated = decode(work, GB200, IDEAL, grid_of(R1, 8, 8, q_replicate=True)).terms
    assert gathered["gather"][0] > 0 and replicated["gather"][0] == 0
    assert replicated["attention weights"][0] > gathered["attention weights"][0]
    assert decode(work, GB200, IDEAL, grid_of(R1, 8)).terms["gather"][0] == 0


def test_a_collective_beyond_the_nvlink_domain_is_slower():
    h200 = load_gpu("h200")
    waits = latency(np.array([1, 8, 16]), h200, "all-reduce").tolist()
    assert waits == pytest.approx([0, 5.9e-6, 2.6e-6 + 4.4e-6 + 15e-6])
    work = Workload(LLAMA, 1000)
    inside = decode(work, GB200, IDEAL, grid_of(LLAMA, 16, 2, batch=64)).terms["all-reduce"][0]
    outside = decode(work, h200, IDEAL, grid_of(LLAMA, 16, 2, batch=64)).terms["all-reduce"][0]
    assert outside > 1.5 * inside


def test_an_all_to_all_of_large_messages_waits_longer_where_that_was_measured():
    wait = load_gpu("h200").wait("all-to-all")
    small, large = latency(np.array([2, 2]), load_gpu("h200"), "all-to-all", np.array([16384, 16385]))
    assert 3e-6 < large - small == pytest.approx(wait.large) and small > 6e-6
    assert latency(2, load_gpu("gb200"), "all-to-all", 1e6) == pytest.approx(3.7e-6), "nobody measured that one"


def test_hop_b_of_the_papers_example():
    serial, pipelined = hop_b(2.0, 1.2, 8)
    assert serial == pytest.approx(25.6) and pipelined == pytest.approx(17.2)
    assert hop_b(1.0, 2.0, 3) == (9.0, 7.0), "links that are slower than compute set the pace"
    assert hop_b(2.0, 1.2, 1) == (3.2, 3.2)


def test_overlap_hides_the_exchange_of_all_requests_but_one():
    work = Workload(LLAMA, 1_000_000, "fp4", "fp4")
    exposed = decode(work, GB200, IDEAL, grid_of(LLAMA, 64, 8, batch=8)).terms["exchange"][0]
    hidden = decode(work, GB200, IDEAL, grid_of(LLAMA, 64, 8, batch=8, overlap=True)).terms["exchange"][0]
    assert hidden == pytest.approx(exposed / 8)
    plain = decode(work, GB200, IDEAL, grid_of(LLAMA, 64, 8, batch=8, overlap=True, merge=NONE))
    assert plain.terms["exchange"][0] == 0 and A2A != NONE


def test_experts_are_read_as_far_as_the_batch_wakes_them():
    """One token reads 8 of 256 experts, a batch of 10,000 practically all."""
    one, many = (
        decode(Workload(R1, 1, "bf16"), GB200, IDEAL, grid_of(R1, 8, batch=batch)).terms["FFN weights"][0]
        for batch in (1, 10_000)
    )
    weights = weights_of(R1)
    fixed = weights.router + weights.shared / 8
    layers = 58 * (fixed + 8 * weights.expert / 8) + 3 * weights.dense_ffn / 8 + weights.embedding / 8
    assert one == pytest.approx(layers * 2 / 8e12)
    assert many > 25 * one


def test_prefill_pays_for_replicated_queries():
    work = Workload(LLAMA, 8192)
    plain, helix = (prefill(work, GB200, IDEAL, grid_of(LLAMA, 64, kvp))[0] for kvp in (1, 8))
    assert 1.05 < helix / plain < 2
    assert prefill(work, GB200, IDEAL, grid_of(LLAMA, 32))[0] > plain


def test_weights_and_cache_of_a_gpu():
    """Llama 8B on one GPU in bf16: all parameters; its cache: 2 * 8 * 128 values of 2 bytes in 32 layers."""
    llama = load_shape("meta-llama/Llama-3.1-8B-Instruct")
    work = Workload(llama, 1)
    assert stored_bytes(work, grid_of(llama, 1))[0] == pytest.approx(parameters(llama) * 2)
    assert cached_bytes(work, grid_of(llama, 1))[0] == 131072
    assert cached_bytes(work, grid_of(llama, 8))[0] == 131072 / 8
    assert cached_bytes(work, grid_of(llama, 16, 2))[0] == 131072 / 8


def test_capacity_counts_whole_blocks_and_whole_users():
    """A pool of 1000 blocks of 16 tokens a rank, shared by 4: a user of 1000 tokens takes 16 blocks, not 15.6."""
    gpu = load_gpu("h200")
    weights = gpu.memory * UTILISATION - RESERVE - 1000 * 16 * 10
    found = capacity(gpu, weights, per_token=10, context=1000, kvp=4, block=16)
    assert (found.granularity, found.users, found.tokens) == (64, 1000 // 16, 64_000)
    assert found.per_user == 16 * 16 * 10
    assert found.wasted == pytest.approx(1 - 62 * 16 / 1000)
    assert found.rounding == pytest.approx(1 - 1000 / 1024)
    assert found.prefix_lost == 31.5
    assert found.more_at == (1000 // 63) * 64 and found.fewer_at == (1000 // 62) * 64 + 1


def test_cliffs_are_where_the_number_of_users_changes():
    gpu = load_gpu("h100")
    at = {"gpu": gpu, "weights": 30e9, "per_token": 5000.0, "kvp": 2, "block": 16}
    here = capacity(context=100_000, **at)
    assert capacity(context=here.more_at, **at).users == here.users + 1
    assert capacity(context=here.more_at + 1, **at).users == here.users
    assert capacity(context=here.fewer_at - 1, **at).users == here.users
    assert capacity(context=here.fewer_at, **at).users == here.users - 1
    nothing = capacity(gpu, 90e9, 5000.0, 1000, 1, 16)
    assert (nothing.users, nothing.fewer_at, nothing.more_at) == (0, None, None)


def test_a_prefix_hit_loses_what_is_beyond_its_last_granule():
    assert recomputed(1000, 16) == 8 and recomputed(1000, 128) == 104 and recomputed(1024, 128) == 0


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-405B-Instruct", "deepseek-ai/DeepSeek-R1"])
def test_ten_thousand_layouts_take_less_than_a_second_of_cpu(model):
    assert seconds(model, 10_000) < 1


def test_hardware_is_found_by_key_and_by_the_drivers_name():
    assert named_gpu("NVIDIA H200").key == "h200" and named_gpu("NVIDIA GB200").key == "gb200"
    assert named_gpu("Tesla T4") is None
    assert load_gpu("H100").arithmetic("fp4") == load_gpu("h100").arithmetic("fp8")
    assert all(load_gpu(key).sources for key in ("h100", "h200", "b200", "gb200", "gb300"))
    with pytest.raises(PlannerError, match=r"did you mean h200\? known: h100, h200"):
        load_gpu("h20")
