"""Plans: complete, legal, and able to say no."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helix_runtime import capabilities
from helix_runtime.layout import LayoutError, resolve_layout
from helix_runtime.planner import Question, calibrate, load_gpu, plan, words
from helix_runtime.planner.calibration import IDEAL
from helix_runtime.planner.cli import main
from helix_runtime.planner.plan import layouts_of
from helix_runtime.planner.show import SCHEMA_FILE, schema
from helix_runtime.planner.verdict import WORTHWHILE, gain
from helix_runtime.shapes import MlaShape, ModelShape, load_shape

R1, LLAMA = "deepseek-ai/DeepSeek-R1", "meta-llama/Llama-3.1-405B-Instruct"
NEMOTRON = "nvidia/Llama-3.1-Nemotron-Nano-8B-v1"


def answer(model, gpus, hardware, context, **options):
    return plan(
        Question(shape=load_shape(model), gpu=load_gpu(hardware), gpus=gpus, context=context, **options),
        options.pop("calibration", None),
    )


@st.composite
def shapes(draw) -> ModelShape:
    mla = draw(st.booleans())
    kv_heads = 1 if mla else draw(st.sampled_from((1, 2, 4, 6, 8)))
    heads = kv_heads * draw(st.sampled_from((1, 2, 3, 4, 8, 16)))
    latent = MlaShape(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, q_lora_rank=None)
    return ModelShape(
        name="drawn",
        architecture="A",
        num_query_heads=heads,
        num_kv_heads=kv_heads,
        head_size=576 if mla else 64,
        num_layers=2,
        hidden_size=heads * 64,
        intermediate_size=512,
        vocab_size=1000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        mla=latent if mla else None,
    )


def legal_by_asking_one_by_one(shape, gpu, gpus, allow_gqa_tpa1) -> set[tuple[int, int, str, str]]:
    found = set()
    for backend in capabilities.backends():
        for tp in range(1, gpus + 1):
            for dcp in range(1, tp + 1):
                for helix in (False, True):
                    try:
                        layout = resolve_layout(
                            tp, dcp, **shape.layout_arguments(), helix_mode=helix, attention_backend=backend,
                            hardware=gpu.family, block_size=16, allow_gqa_tpa1=allow_gqa_tpa1,
                        )  # fmt: skip
                    except LayoutError:
                        continue
                    found.add((tp, dcp, layout.mode, backend))
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shapes(), st.sampled_from(("h100", "h200", "b200", "gb200")), st.integers(1, 9), st.booleans())
def test_every_legal_layout_appears_and_no_illegal_one(shape, hardware, gpus, allow_gqa_tpa1):
    gpu = load_gpu(hardware)
    question = Question(shape=shape, gpu=gpu, gpus=gpus, context=1000, allow_gqa_tpa1=allow_gqa_tpa1)
    expected = legal_by_asking_one_by_one(shape, gpu, gpus, allow_gqa_tpa1)
    rows = plan(question, IDEAL).rows
    assert layouts_of(rows) == expected and len(rows) == len(expected)
    for row in rows:
        assert row.latency_low_ms <= row.latency_ms <= row.latency_high_ms
        assert row.latency_ms == pytest.approx(sum(row.terms_ms.values()))


@pytest.mark.parametrize("model", [R1, LLAMA])
@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp4"])
def test_at_4k_it_advises_against_helix(model, dtype):
    found = answer(model, 64, "gb200", 4096, weights=dtype, kv=dtype)
    assert found.verdict.pays is False and not found.best.helix
    assert found.verdict.reason.startswith("short context: reading KV is ")
    assert found.verdict.gains.latency < 1


@pytest.mark.parametrize("model", [R1, LLAMA])
@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp4"])
@pytest.mark.parametrize("load", [{"batch": 1024}, {"ttl_ms": 20}])
def test_large_batches_at_4k_are_no_reason_for_helix_either(model, dtype, load):
    """There a cache of a few copies is worth it for MLA, which stock DCP has and Helix has not."""
    found = answer(model, 64, "gb200", 4096, weights=dtype, kv=dtype, **load)
    verdict, said = found.verdict, words.verdict(found)
    assert verdict.pays is False and not found.best.helix
    assert said.startswith("Serve ") and "Helix pays" not in said and "times the users at" not in said
    if found.best.mode == "standard-dcp":
        assert f"with TP {found.best.tp}, DCP {found.best.kvp}" in verdict.reason
        assert "sharing the KV cache pays, and stock DCP does it better: " in verdict.reason
        assert found.best == verdict.stock_dcp and gain(found.question, verdict.standard, found.best) >= WORTHWHILE
    else:
        assert found.best == verdict.standard
    if model == R1 and dtype != "fp4":
        assert found.best.mode == "standard-dcp" and 1 < found.best.tpa < found.best.tp


def test_a_small_modelled_gain_is_no_reason():
    """8 % at 4k: the model is not that exact, and the same holds for stock DCP, which is as fast."""
    verdict = answer(LLAMA, 64, "gb200", 4096, batch=1024).verdict
    assert 1.05 < verdict.gains.latency < WORTHWHILE
    assert verdict.reason.startswith("1.08 times is less than the 1.1 from which a modelled gain counts; ")
    assert verdict.best == verdict.standard and verdict.stock_dcp.latency_ms < verdict.standard.latency_ms


def test_stock_dcp_is_priced_with_either_exchange_and_named_beside_helix():
    """For MLA on all ranks it is the same layout, so it takes as long; for GQA it gathers queries instead."""
    found = answer(R1, 64, "gb200", 1_000_000)
    verdict, said = found.verdict, words.verdict(found)
    assert verdict.stock_dcp.comm == "a2a" and "--dcp-comm-backend a2a" in verdict.stock_dcp.command
    assert verdict.stock_dcp.latency_ms == pytest.approx(verdict.helix.latency_ms)
    assert "Stock DCP shares the cache as well: " in said and "--dcp-comm-backend a2a takes" in said
    assert all("--dcp-comm-backend" not in row.command for row in found.rows if row.helix)
    assert {row.comm for row in found.rows if row.kvp == 1} == {None}


@pytest.mark.parametrize("model, gpus", [(R1, 32), (R1, 64), (LLAMA, 64)])
def test_at_one_million_tokens_it_advises_helix(model, gpus):
    found = answer(model, gpus, "gb200", 1_000_000)
    assert found.verdict.pays is True and found.best.helix
    if found.best.refused_today:  # the fastest backend is one that the plugin refuses so far: another is named
        assert "It does not start today" in words.verdict(found) and "The best that starts today is" in words.verdict(
            found
        )
    assert found.verdict.gains.interactivity > 1.13 and found.verdict.gains.most_users >= 4
    assert found.verdict.crossover < 1_000_000


#: (model, GPUs, dtype) -> latency for 8 users, lowest latencies, most users, at 1M tokens on GB200: docs/planner.md.
GAINS = {
    (LLAMA, 64, "bf16"): (1.49, 1.42, 5.0),
    (LLAMA, 64, "fp4"): (1.06, 0.99, 2.0),
    (R1, 64, "bf16"): (None, 3.28, 36.0),
    (R1, 64, "fp4"): (1.99, 2.03, 10.0),
    (R1, 32, "bf16"): (None, 3.28, 18.0),
    (R1, 32, "fp4"): (1.73, 2.03, 10.0),
}


@pytest.mark.parametrize("asked", GAINS, ids=lambda asked: "-".join(map(str, asked)).replace("/", "--"))
def test_gains_at_one_million_tokens_are_those_of_the_docs(asked):
    """The paper: 1.13 and 4 for 405B, 1.5 and 32 for R1, in FP4. Twice the GPUs, twice the users of bf16's best."""
    model, gpus, dtype = asked
    gains = answer(model, gpus, "gb200", 1_000_000, weights=dtype, kv=dtype).verdict.gains
    latency, interactivity, users = GAINS[asked]
    assert gains.latency == (None if latency is None else pytest.approx(latency, rel=0.05))
    assert gains.interactivity == pytest.approx(interactivity, rel=0.05)
    assert gains.most_users == pytest.approx(users, rel=0.05)


def test_the_published_nemotron_command_buys_no_capacity(capsys):
    command = f"--model {NEMOTRON} --gpus 8 --hardware h200 --context 131072 --tp 8 --dcp 2 --format json"
    assert main(command.split()) == 0
    said = json.loads(capsys.readouterr().out)
    row = next(row for row in said["layouts"] if (row["tp"], row["kvp"], row["mode"]) == (8, 2, "helix-gqa"))
    plain = next(row for row in said["layouts"] if (row["tp"], row["kvp"]) == (8, 1))
    assert row["capacity_factor"] == 1 and row["kv_bytes_per_user_gpu"] == plain["kv_bytes_per_user_gpu"]
    assert "KV capacity does not grow" in said["about"]
    assert "What grows: attention weights" in said["about"] and "cache steps from 16 to 32" in said["about"]
    assert "Capacity grows with TP 16, DCP 2" in said["about"]
    assert said["helix_pays"] is False and "holds each KV head once" in said["reason"]


def test_capacity_factors_are_the_layouts_own():
    """GQA with TP 16 on 8 KV heads: 2. MLA with DCP = TP: KVP."""
    for row in answer(NEMOTRON, 16, "h200", 1000).rows:
        if row.tp == 16:
            assert row.capacity_factor == (2 if row.kvp > 1 else 1) and row.duplication == (1 if row.kvp > 1 else 2)
    assert {row.capacity_factor for row in answer(R1, 16, "h200", 1000).rows if row.tp == row.kvp == 16} == {16}


def test_more_users_than_a_latency_allows_are_not_planned():
    found = answer(R1, 64, "gb200", 1_000_000, ttl_ms=20)
    possible = [row for row in found.rows if row.possible]
    assert found.best.users == max(row.users for row in possible)
    for row in possible:
        assert row.latency_ms <= 20 and row.users <= row.users_that_fit
    assert found.verdict.gains.latency is None


def test_nothing_fits_and_too_slow_are_told_apart():
    nothing = answer(LLAMA, 8, "h100", 1000)
    assert nothing.best is None and "the weights take at least 1" in nothing.verdict.reason
    slow = answer(NEMOTRON, 8, "h200", 131072, ttl_ms=0.5)
    assert slow.best is None and "no layout keeps 0.5 ms a token" in slow.verdict.reason


def test_slow_links_are_named():
    """DeepSeek-R1 over two nodes of eight H100."""
    found = answer(R1, 16, "h100", 32_768, weights="fp8", kv="fp8")
    assert found.verdict.pays is False and "slow links: TP 16 leaves the NVLink domain of 8" in found.verdict.reason


def test_a_batch_bound_by_arithmetic_is_named():
    found = answer(LLAMA, 16, "h200", 8192, batch=512, weights="fp8", kv="fp8")
    assert found.verdict.pays is False and "bound by FFN arithmetic" in found.verdict.reason


def test_the_front_holds_what_nothing_beats():
    found = answer(LLAMA, 64, "gb200", 1_000_000)
    for row in found.front:
        better = [
            other
            for other in found.rows
            if other.possible
            and other.tokens_per_second_user > row.tokens_per_second_user
            and other.tokens_per_second_gpu > row.tokens_per_second_gpu
        ]
        assert not better and row.possible


def test_commands_are_those_of_the_layout():
    found = answer(NEMOTRON, 16, "h200", 8192, kv="fp8")
    row = next(
        row for row in found.rows if (row.tp, row.kvp, row.mode, row.backend) == (16, 2, "helix-gqa", "FLASH_ATTN")
    )
    assert row.command == (
        f"vllm serve {NEMOTRON} --tensor-parallel-size 16 --decode-context-parallel-size 2 --helix-mode "
        "--attention-backend FLASH_ATTN --max-model-len 8192 --kv-cache-dtype fp8"
    )
    assert "has not proved Helix with an fp8 KV cache" in row.refused_today


@pytest.mark.parametrize(
    "model, dtype, flag, note",
    [
        (LLAMA, "bf16", False, None),
        (LLAMA, "fp8", True, None),  # vLLM quantises it while it loads
        (
            LLAMA,
            "fp4",
            False,
            "need a checkpoint that holds them (NVFP4): name it instead of meta-llama/Llama-3.1-405B",
        ),
        (R1, "fp8", False, None),  # what DeepSeek published
        (R1, "bf16", False, "this checkpoint is fp8"),
        (R1, "fp4", False, "which is fp8"),
    ],
)
def test_commands_load_the_weights_that_were_priced(model, dtype, flag, note):
    found = answer(model, 64, "gb200", 4096, weights=dtype)
    assert all(("--quantization fp8" in row.command) is flag for row in found.rows)
    said = [one for one in words.serving(found) if "GPUs" not in one]
    assert len(said) == (note is not None) and all(note in one for one in said)


def test_a_layout_that_does_not_start_comes_with_one_that_does(capsys):
    command = f"--model {R1} --gpus 32 --hardware gb200 --context 1000000 --ttl-ms 20"
    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    refused, _, starts = shown.partition("That does not start today. This does:")
    assert "--attention-backend CUTLASS_MLA" in refused.partition("Serve it with:")[2]
    assert "vllm serve deepseek-ai/DeepSeek-R1" in starts and "… on each of " in starts
    assert main([*command.split(), "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["starts_today"]["refused_today"] is None and said["best"]["refused_today"]
    assert said["starts_today"]["command"] in starts
    assert "the model's own limit is 163,840 tokens: more needs scaled RoPE (--hf-overrides)" in said["serving"]


def test_prefill_is_compared_with_standard_tp_on_the_same_backend():
    rows = answer(R1, 8, "h200", 32_768).rows
    alone = [row for row in rows if row.kvp == 1]
    assert len({row.backend for row in alone}) > 1 and {row.prefill_factor for row in alone} == {1.0}
    plain = {(row.tp, row.backend): row.prefill_s for row in alone}
    shared = [row for row in rows if (row.tp, row.backend) in plain and row.kvp > 1]
    assert shared
    for row in shared:
        assert (
            row.prefill_factor == pytest.approx(row.prefill_s / plain[row.tp, row.backend]) and row.prefill_factor > 1
        )


def test_bands_are_printed_as_rows_use_them(capsys):
    """Backend by backend, and without the attention that other models have."""
    command = f"--model {NEMOTRON} --gpus 8 --hardware h200 --context 4096"
    assert main([*command.split(), "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)["calibration"]
    for backend in ("FLASH_ATTN", "FLASHINFER"):
        fit = calibrate("h200", backend)["attention"]
        assert told[f"attention with {backend}"]["band"] == pytest.approx(math.exp(fit.band))
        assert told[f"attention with {backend}"]["n"] == fit.n > 0
    assert told["attention with FLASH_ATTN"]["band"] != told["attention with FLASHINFER"]["band"]
    assert "attention" not in told and not any(kind.startswith("latent") for kind in told)
    assert main(command.split()) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"±{math.expm1(calibrate('h200', 'FLASH_ATTN')['attention'].band):.0%})" in shown


def test_measurements_that_no_fit_could_use_are_told(capsys):
    assert main(f"--model {NEMOTRON} --gpus 8 --hardware h200 --context 4096 --format json".split()) == 0
    left = json.loads(capsys.readouterr().out)["measurements_left_out"]
    assert any("step-h200.json" in reason and "operation 'step'" in reason for reason in left)


@pytest.mark.parametrize(
    "changed, said",
    [
        ("--hardware h20", "did you mean h200? known: h100, h200, b200, gb200"),
        ("--gpus 0", "'0'; allowed: a whole number from 1 to 1,000,000,000"),
        ("--batch 99999999999999999999", "allowed: a whole number from 1 to 1,000,000,000"),
        ("--context ²", "allowed: a whole number from 1 to 1,000,000,000"),
        ("--ttl-ms x", "'x'; allowed: a number above 0"),
        ("--model nobody/nothing", "known: Qwen/Qwen3-235B-A22B"),
        ("--backend FLASHMLA", "allowed with --backend: FLASH_ATTN, FLASHINFER"),
        ("--backend NONSENSE", "allowed with --backend: FLASH_ATTN, FLASHINFER"),
        ("--tp 8", "--tp and --dcp go together"),
        ("--tp 8 --dcp 3", "TP=8 is not divisible by DCP=3"),
        ("--tp 16 --dcp 2", "give --gpus 16"),
        ("--dtype int3", "invalid choice: 'int3'"),
        ("--block-size 0", "allowed: a whole number from 1"),
    ],
)
def test_questions_without_an_answer_say_what_is_allowed(changed, said, capsys):
    command = f"--model {NEMOTRON} --gpus 8 --hardware h200 --context 4096 {changed}"
    assert main(command.split()) == 2
    told = capsys.readouterr()
    assert said in told.err and told.out == ""


def test_a_folder_is_a_model_too(tmp_path, capsys):
    from harness.models import RECIPES

    (tmp_path / "config.json").write_text(json.dumps(RECIPES["llama-k4"].config()))
    assert main(f"--model {tmp_path} --gpus 4 --hardware h200 --context 1000".split()) == 0
    shown = capsys.readouterr().out
    assert "Serve " in shown and f"vllm serve {tmp_path}" in shown and "helix-gqa" in shown


SMALL = {
    "model_type": "llama", "architectures": ["A"], "num_attention_heads": 8, "num_key_value_heads": 2,
    "hidden_size": 512, "num_hidden_layers": 2, "intermediate_size": 1024, "vocab_size": 1000,
    "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    "config, said",
    [
        ("{", "is no JSON"),
        ("[]", "holds list, not an object"),
        ('"llama"', "holds str, not an object"),
        ({"num_attention_heads": "8"}, "has num_attention_heads '8'; allowed: a whole number from 1"),
        ({"num_attention_heads": 0}, "has num_attention_heads 0; allowed"),
        ({"num_hidden_layers": None}, "has num_hidden_layers None; allowed"),
        ({"hidden_size": True}, "has hidden_size True; allowed"),
        ({"num_key_value_heads": -2}, "has num_key_value_heads -2; allowed"),
        ({"architectures": []}, "has architectures []; allowed: a list of names"),
        ({"model_type": ["llama"]}, "is not a known family"),
        ({"num_experts": 4, "num_experts_per_tok": "a", "moe_intermediate_size": 8}, "has num_experts_per_tok 'a'"),
        ({"model_type": "deepseek_v3"}, "has no field 'kv_lora_rank'"),
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3 KV heads"),
    ],
)
def test_what_is_no_config_is_refused_with_the_reason(config, said, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(SMALL | config))
    assert main(f"--model {file} --gpus 4 --hardware h200 --context 1000".split()) == 2
    told = capsys.readouterr()
    assert said in told.err and told.out == "" and str(file) in told.err


def test_a_hub_model_that_was_downloaded_before_is_read_from_the_cache(tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["--model", "some/model", "--gpus", "4", "--hardware", "h200", "--context", "1000"]) == 0
    assert "vllm serve some/model --tensor-parallel-size" in capsys.readouterr().out
    assert main(["--model", "some/other", "--gpus", "4", "--hardware", "h200", "--context", "1000"]) == 2
    assert "hf download some/other config.json" in capsys.readouterr().err


def test_more_gpus_than_a_model_has_heads_make_more_servers():
    """And no more layouts: TP never exceeds the 128 query heads, whatever --gpus says."""
    few, many = (answer(LLAMA, gpus, "gb200", 4096) for gpus in (128, 1_000_000))
    assert layouts_of(few.rows) == layouts_of(many.rows)
    assert max(row.tp for row in many.rows) == 128
    assert next(row.servers for row in many.rows if row.tp == 8) == 125_000


def test_the_committed_schema_is_that_of_the_document():
    assert SCHEMA_FILE.read_text() == schema()
