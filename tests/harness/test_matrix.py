"""Suites -> the one list of cells: axes, baselines, keys, declared verdicts, what a host skips."""

import json
from itertools import pairwise

import pytest

from harness import matrix
from harness.cell import Mode
from harness.hardware import Hardware
from harness.matrix import PlanError, baseline_of, cells_of, expand, select
from harness.suite import Suite, load_all
from harness.verdict import Verdict
from harness.yaml_file import SuiteError

GIB = 2**30
CPU = Hardware(family="cpu", name="test", count=2, memory_bytes=8 * GIB)
NEMOTRON = (
    "vllm serve nvidia/Llama-3.1-Nemotron-Nano-8B-v1 --tensor-parallel-size 8 --decode-context-parallel-size 2 "
    "--helix-mode --attention-backend FLASH_ATTN --cp-kv-cache-interleave-size 16"
)
DEEPSEEK = (
    "vllm serve deepseek-ai/DeepSeek-V2-Lite-Chat --tensor-parallel-size 8 --decode-context-parallel-size 8 "
    "--helix-mode --cp-kv-cache-interleave-size 64 --trust-remote-code"
)


def hopper(count):
    return Hardware(family="hopper", name="H", count=count, memory_bytes=80 * GIB, compute_capability="9.0")


def suite(name="mine", defaults=None, **group):
    base = {
        "name": "g",
        "mode": "helix-gqa",
        "backend": "HELIX_CPU",
        "hardware": "cpu",
        "model": "recipe:llama-k4",
        "layout": {"tp": 4, "dcp": 2},
    }
    document = {"schema": 1, "name": name, "description": "d", "defaults": defaults or {}, "groups": [base | group]}
    return Suite.model_validate(document)


def cells(one):
    return [cell for group in one.groups for cell in cells_of(group, one)]


def test_lists_are_axes_and_are_crossed():
    one = suite(interleave=[1, 16], comm=["a2a", "ag_rs"], layout=[{"tp": 4, "dcp": 2}, {"tp": 8, "dcp": 4}])
    made = [(cell.tp, cell.kvp, cell.interleave, cell.comm) for cell in cells(one)]
    assert made == [
        (tp, kvp, interleave, comm)
        for tp, kvp in [(4, 2), (8, 4)]
        for interleave in [1, 16]
        for comm in ["a2a", "ag_rs"]
    ]


def test_a_baseline_that_many_share_is_planned_once(monkeypatch):
    """What `--list` of ten thousand cells takes is a few steps a cell: each cell and baseline asks for its own once."""
    asked = []

    def counted(cell):
        asked.append(cell)
        return baseline_of(cell)

    monkeypatch.setattr(matrix, "baseline_of", counted)
    many = suite(serve={"seed": list(range(50))}, interleave=[1, 16])
    plan = expand([many, suite("other", serve={"seed": 1}, interleave=[1, 16])], [CPU])
    assert len(plan) == 100 + 2 * 50  # two cells a seed, which share standard TP4 and that one's TP1
    assert len(asked) == (100 + 2 * 50) + (2 + 2)
    assert {item.suites for item in plan if dict(item.cell.serve)["seed"] == 1} == {("mine", "other")}


def test_serve_options_are_axes_and_come_after_the_defaults():
    one = suite(
        defaults={"cpu": {"dtype": "float32", "seed": 0}},
        serve={"seed": 7, "enable-prefix-caching": [True, False, None], "max-model-len": 512},
    )
    assert [cell.serve for cell in cells(one)] == [
        (("dtype", "float32"), ("seed", 7), ("enable-prefix-caching", True), ("max-model-len", 512)),
        (("dtype", "float32"), ("seed", 7), ("no-enable-prefix-caching", True), ("max-model-len", 512)),
        (("dtype", "float32"), ("seed", 7), ("max-model-len", 512)),
    ]


def test_defaults_are_for_their_hardware_only():
    one = suite(defaults={"cpu": {"dtype": "float32"}}, hardware=["cpu", "hopper"], backend="HELIX_CPU")
    assert {cell.hardware: cell.serve for cell in cells(one)} == {"cpu": (("dtype", "float32"),), "hopper": ()}


def test_helix_options_reach_the_command_as_json():
    (cell,) = cells(suite(helix={"allow_gqa_tpa1": True}))
    command = cell.command()
    assert json.loads(command[command.index("--additional-config") + 1]) == {"helix": {"allow_gqa_tpa1": True}}


def test_a_changed_copy_of_a_cell_has_a_key_and_an_id_of_its_own():
    (cell,) = cells(suite())
    faulty = cell.model_copy(update={"fault": "swap"})
    assert cell.key != faulty.key
    assert faulty.id == f"{cell.id}/fault=swap"
    assert faulty.model_copy(update={"fault": None}) == cell


def test_a_baseline_is_added_before_its_cells_and_once():
    plan = expand([suite(interleave=[1, 16], serve={"seed": 3})], [CPU])
    reference, base, first, second = plan
    assert [item.cell.mode for item in plan] == [Mode.STANDARD_TP] * 2 + [Mode.HELIX_GQA] * 2
    assert first.baseline == second.baseline == base.cell
    assert (base.cell.backend, base.cell.tp, base.cell.kvp, base.cell.interleave) == ("CPU_ATTN", 4, 1, 1)
    assert (base.cell.comm, base.cell.helix, base.cell.serve) == (None, (), (("seed", 3),))
    assert base.baseline == reference.cell
    assert base.declared is Verdict.PASS
    assert base.cell.command()[-2:] == ["--seed", "3"]
    assert "--helix-mode" not in base.cell.command()


def test_a_gpu_baseline_keeps_the_backend():
    (cell,) = cells(suite(hardware="hopper", backend="FLASH_ATTN"))
    assert baseline_of(cell).backend == "FLASH_ATTN"


def test_the_same_cell_of_two_suites_is_one_cell():
    plan = expand([suite("one"), suite("two", interleave=[1, 16])], [CPU])
    assert [item.suites for item in plan] == [("one", "two"), ("one", "two"), ("one", "two"), ("two",)]
    assert len({item.cell.key for item in plan}) == len({item.cell.id for item in plan}) == 4


def test_suites_may_not_contradict_each_other():
    with pytest.raises(SuiteError, match=r"declared pass \(one\) and xfail \(two\)"):
        expand([suite("one"), suite("two", expect="xfail", why="so")], [CPU])


@pytest.mark.parametrize(
    ("group", "refusal"),
    [
        ({"layout": {"tp": 4}}, "DCP > 1"),
        ({"layout": {"tp": 8, "dcp": 2}, "model": "recipe:llama-k2"}, "TPA=4 exceeds the model's 2 KV heads"),
        ({"layout": {"tp": 6, "dcp": 2}}, "8 query heads are not divisible by TPA=3"),
        ({"layout": {"tp": 4, "dcp": 4}}, "TPA=1"),
        ({"interleave": 24, "serve": {"block-size": 32}}, "interleave size 24 does not divide the block size 32"),
        ({"mode": "standard-dcp"}, "needs TP > K"),
    ],
)
def test_an_illegal_layout_is_declared_rejected_by_its_rule(group, refusal):
    (item,) = expand([suite(**group)], [CPU])  # alone: a refusal is compared with nothing
    assert item.declared is Verdict.REJECTED
    assert refusal in item.refusal
    assert refusal in item.declared_why


def test_the_switch_makes_tpa1_legal():
    _, base, item = expand([suite(layout={"tp": 4, "dcp": 4}, helix={"allow_gqa_tpa1": True})], [CPU])
    assert item.declared is Verdict.PASS
    assert item.baseline == base.cell


def test_what_the_plugin_refuses_on_cuda_is_declared_so():
    model = "nvidia/Llama-3.1-Nemotron-Nano-8B-v1"
    for backend, serve, why in (
        (
            "TRITON_ATTN",
            {"enforce-eager": True},
            "no LSE for decode, so partial results cannot be merged (no DCP) [v1/",
        ),
        ("auto", {"enforce-eager": True}, "with the backend that vLLM would choose"),
        ("FLASH_ATTN", {"compilation-config.cudagraph_mode": "FULL_DECODE_ONLY"}, "graphs of mode FULL_DECODE_ONLY"),
    ):
        (item,) = expand([suite(hardware="hopper", backend=backend, model=model, serve=serve)], [hopper(8)])
        assert item.declared is Verdict.REJECTED and why in item.declared_why and why in item.refusal
    for backend in ("FLASH_ATTN", "FLASHINFER"):
        for serve in ({"enforce-eager": True}, {}):
            _, item = expand([suite(hardware="hopper", backend=backend, model=model, serve=serve)], [])
            assert item.declared is Verdict.PASS
    mla = suite(mode="helix-mla", hardware="hopper", backend="TRITON_MLA", model="recipe:deepseek-v2",
                layout={"tp": 4, "dcp": 4})  # fmt: skip
    (item,) = expand([mla], [hopper(8)])
    assert "with TRITON_MLA inside CUDA graphs on four GPUs; add --enforce-eager" in item.refusal


@pytest.mark.parametrize(("backend", "file"), [("CUTLASS_MLA", "cutlass_mla"), ("FLASHINFER_MLA", "flashinfer_mla")])
def test_blackwells_backends_are_skipped_on_hopper_and_refused_there_by_vllms_rule(backend, file):
    one = suite(mode="helix-mla", hardware=["hopper", "blackwell"], backend=backend, model="recipe:deepseek-v2",
                layout={"tp": 4, "dcp": 4}, serve={"enforce-eager": True})  # fmt: skip
    refused, absent = expand([one], [hopper(8)])
    assert absent.skip.startswith("no blackwell here") and "no cell has proved" in absent.declared_why
    assert refused.declared is Verdict.REJECTED and refused.skip is None
    rule = f"it needs compute capability 10.x only [v1/attention/backends/mla/{file}.py: supports_compute_capability]"
    assert rule in refused.refusal and "with vLLM 0.32.0" in refused.refusal and rule in refused.declared_why


def test_a_backend_without_lse_is_declared_rejected():
    one = suite(mode="standard-dcp", hardware="hopper", backend="TRITON_ATTN", layout={"tp": 8, "dcp": 2},
                model="Qwen/Qwen3-30B-A3B")  # fmt: skip
    (item,) = expand([one], [hopper(8)])
    assert item.declared is Verdict.REJECTED
    assert "LSE" in item.declared_why


def test_what_the_suite_says_wins():
    (item,) = expand([suite(expect="rejected", why="no cell proved it", refusal="LoRA")], [CPU])
    assert (item.declared, item.declared_why, item.refusal) == (Verdict.REJECTED, "no cell proved it", "LoRA")


def test_a_model_without_a_shape_is_planned_and_says_so():
    _, item = expand([suite(model="some-org/some-model")], [CPU])
    assert item.declared is Verdict.PASS
    assert "layout not checked" in item.declared_why


def test_absent_hardware_and_too_few_gpus_are_skips_with_the_reason():
    one = suite(hardware=["hopper", "blackwell"], backend="FLASH_ATTN", model="nvidia/Llama-3.1-Nemotron-Nano-8B-v1",
                serve={"enforce-eager": True})  # fmt: skip
    reasons = {item.cell.hardware: item.skip for item in expand([one], [hopper(2)])}
    assert reasons["hopper"] == "needs 4 hopper GPUs; this host has 2 (--share-gpu puts all ranks on one)"
    assert reasons["blackwell"].startswith("no blackwell here")
    declared = {item.declared for item in expand([one], [hopper(2)])}
    assert declared == {Verdict.PASS}  # what the cell would be elsewhere is kept
    assert {item.skip for item in expand([one], [hopper(4)]) if item.cell.hardware == "hopper"} == {None}


def test_selection_takes_baselines_along():
    plan = expand([suite(interleave=[1, 16])], [CPU])
    assert [item.cell.id for item in select(plan, ["*/i16"])] == [
        "cpu/standard-tp/CPU_ATTN/llama-k4/tp1/no-enable-prefix-caching=True/workload=standard@4",
        "cpu/standard-tp/CPU_ATTN/llama-k4/tp4",
        "cpu/helix-gqa/HELIX_CPU/llama-k4/tp4-dcp2/i16",
    ]
    assert select(plan, []) == plan
    with pytest.raises(PlanError, match=r"matches none of 4 cells; nearest: cpu/helix-gqa"):
        select(plan, ["cpu/helix-gqa/HELIX_CPU/llama-k4/tp4-dcp2/i17"])


def test_no_two_cells_share_an_id():
    with pytest.raises(SuiteError, match="more than 20000 cells"):
        expand([suite(serve={"x": list(range(150)), "y": list(range(150))})], [CPU])
    plan = expand([suite(serve={"max-model-len": [2048, 4096], "seed": [0, 1]})], [CPU])
    assert len({item.cell.id for item in plan}) == len(plan) == 12


def test_ten_thousand_cells_expand():
    plan = expand([suite(serve={"x": list(range(100)), "y": list(range(50))})], [CPU])
    assert len(plan) == 15_000  # 5,000 cells, each with a baseline and a TP1 reference of its own
    assert [item.cell.tp for item in plan] == [1, 4, 4] * 5_000
    assert not any(item.baseline for item in plan[0::3])
    assert all(item.baseline == before.cell for before, item in pairwise(plan) if item.baseline)


@pytest.fixture(scope="module")
def committed():
    return expand(load_all(), [CPU])


@pytest.mark.parametrize(
    ("line", "tpa", "declared", "why"),
    [
        (NEMOTRON, 4, Verdict.PASS, "supports_dcp"),
        (DEEPSEEK, 1, Verdict.REJECTED, "the plugin so far: no cell has proved Helix for MLA models with the backend"),
    ],
)
def test_the_published_usage_is_a_cell_verbatim_and_its_layout_is_legal(committed, line, tpa, declared, why):
    items = [item for item in committed if item.cell.shown() == line]
    assert items
    for item in items:
        # Legal by the layout's rules; what the plugin still refuses on CUDA is a backend that it was not told.
        assert item.declared is declared and item.declared_why.startswith(why)
        assert item.cell.tpa == tpa
        assert "layout not checked" not in item.declared_why


def test_every_committed_layout_was_checked_against_a_shape(committed):
    assert not [item.cell.id for item in committed if "layout not checked" in item.declared_why]


def test_committed_baselines_are_stock(committed):
    keys = {item.cell.key for item in committed}
    for item in committed:
        if item.declared in (Verdict.PASS, Verdict.XFAIL) and not item.cell.baseline:
            assert item.baseline.key in keys
            same = item.baseline.tp == item.cell.tp
            assert same or f"compared with standard TP on {item.baseline.tp} ranks" in item.declared_why
            assert not item.baseline.backend.startswith("HELIX")


def test_the_cpu_cells_that_the_claim_stands_on(committed):
    here = {item.cell.id: item.declared for item in committed if item.skip is None}
    for id in (
        "cpu/helix-gqa/HELIX_CPU/llama-k4/tp4-dcp2/a2a/i1",
        "cpu/helix-gqa/HELIX_CPU/llama-k4/tp4-dcp2/a2a/i16",
        "cpu/helix-gqa/HELIX_CPU/llama-k4/tp4-dcp2/ag_rs/i1/workload=smoke",
        "cpu/helix-gqa/HELIX_CPU/qwen3-retrieve-k4/tp4-dcp2/a2a/i1/workload=smoke",
        "cpu/standard-dcp/HELIX_CPU/llama-retrieve-k2/tp4-dcp2/a2a/i1/workload=smoke",
        "cpu/standard-dcp/HELIX_CPU/llama-retrieve-k2/tp4-dcp2/ag_rs/i1/workload=smoke",
        "cpu/standard-dcp/HELIX_CPU_MLA/deepseek-v2/tp4-dcp2/ag_rs/i16/block-size=16",
        "cpu/standard-dcp/HELIX_CPU_MLA/deepseek-v2/tp4-dcp2/a2a/i16/block-size=16",
        "cpu/helix-mla/HELIX_CPU_MLA/deepseek-v2/tp4-dcp4/a2a/i1/block-size=16",
        "cpu/helix-mla/HELIX_CPU_MLA/deepseek-v2/tp4-dcp4/a2a/i16/block-size=16",
        "cpu/helix-mla/HELIX_CPU_MLA/deepseek-v2/tp2-dcp2/ag_rs/i1/block-size=16/workload=smoke",
        "cpu/helix-mla/HELIX_CPU_MLA/deepseek-v3-retrieve/tp4-dcp4/a2a/i64/block-size=64/workload=smoke",
        "cpu/helix-mla/HELIX_CPU_MLA/deepseek-v2-retrieve/tp4-dcp4/a2a/i16/block-size=16/max-num-batched-tokens=128"
        "/workload=smoke",
        "cpu/helix-gqa/HELIX_CPU/qwen3-moe-retrieve-k4/tp4-dcp2/a2a/i16/workload=smoke",
        "cpu/helix-gqa/HELIX_CPU/llama-retrieve-k6/tp6-dcp3/a2a/i16/max-model-len=1920/workload=smoke",
    ):
        assert here[id] is Verdict.PASS
    assert list(here.values()).count(Verdict.REJECTED) == 32


def test_committed_refusals_quote_the_rule(committed):
    for item in committed:
        if item.declared is Verdict.REJECTED:
            assert item.refusal, item.cell.id
            if "[rule " in item.declared_why:
                assert item.refusal in item.declared_why, item.cell.id
