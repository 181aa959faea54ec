"""Refusals and admissions, on the configuration objects of the vLLM that is installed; no worker starts."""

import pytest

from helix_runtime.vllm_plugin import compat
from helix_runtime.vllm_plugin.refusal import HelixRefusal

HELIX = {"helix_mode": True}


def test_helix_layout_is_admitted_with_a2a_as_default(engine_config):
    config = engine_config(tensor_parallel_size=4, decode_context_parallel_size=2, helix=HELIX)
    assert config.parallel_config.dcp_comm_backend == "a2a"
    assert config.parallel_config.decode_context_parallel_size == 2


def test_the_users_combine_is_kept(engine_config):
    config = engine_config(
        tensor_parallel_size=4, decode_context_parallel_size=2, dcp_comm_backend="ag_rs", helix=HELIX
    )
    assert config.parallel_config.dcp_comm_backend == "ag_rs"


def test_standard_dcp_keeps_vllms_default(engine_config):
    config = engine_config(
        tensor_parallel_size=4, decode_context_parallel_size=2, helix={}, model={"num_key_value_heads": 2}
    )
    assert config.parallel_config.dcp_comm_backend == "ag_rs"


def test_without_helix_vllm_itself_refuses_tpa_below_k(engine_config):
    with pytest.raises(ValueError, match="greater than the model's total number of KV heads"):
        engine_config(tensor_parallel_size=4, decode_context_parallel_size=2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tensor_parallel_size": 4}, "DCP > 1"),
        ({"tensor_parallel_size": 4, "decode_context_parallel_size": 4}, "TPA=1"),
        ({"tensor_parallel_size": 8, "decode_context_parallel_size": 2, "model": {"num_key_value_heads": 2}}, "TPA=4"),
        (
            {"tensor_parallel_size": 4, "decode_context_parallel_size": 2, "cp_kv_cache_interleave_size": 24},
            "interleave",
        ),
    ],
)
def test_illegal_layouts_quote_their_rule(engine_config, arguments, sentence):
    with pytest.raises(HelixRefusal) as refusal:
        engine_config(helix=HELIX, **arguments)
    assert sentence in str(refusal.value)
    assert "legal here" in str(refusal.value)


def test_tpa_1_needs_its_switch(engine_config):
    layout = {"tensor_parallel_size": 4, "decode_context_parallel_size": 4}
    config = engine_config(helix={**HELIX, "allow_gqa_tpa1": True}, **layout)
    assert config.parallel_config.decode_context_parallel_size == 4


TP4_DCP2 = {"tensor_parallel_size": 4, "decode_context_parallel_size": 2}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"enable_lora": True}, "LoRA (--enable-lora)"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism (PCP)"),
        ({"enable_dbo": True}, "dual batch overlap (DBO)"),
        ({"quantization": "fp8"}, "quantised weights (--quantization)"),
        ({"model": {"attention_sinks": True}}, "attention sinks"),
        ({"kv_cache_dtype": "fp8"}, "a quantised KV cache (--kv-cache-dtype)"),
        (
            {"model": {"sliding_window": 128, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}},
            "sliding",
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 4}},
            "speculative decoding",
        ),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors"),
    ],
)
def test_unproved_features_are_refused_by_name(engine_config, arguments, named):
    with pytest.raises(HelixRefusal) as refusal:
        engine_config(helix=HELIX, **TP4_DCP2, **arguments)
    assert named in str(refusal.value)
    assert "without --helix-mode" in str(refusal.value)


def test_an_architecture_off_the_list_is_refused_by_name(engine_config):
    olmo2 = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    with pytest.raises(HelixRefusal, match=r"Olmo2ForCausalLM is not on Helix's list.*LlamaForCausalLM"):
        engine_config(helix=HELIX, model=olmo2, **TP4_DCP2)


def test_an_unsupported_version_is_refused(engine_config, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.19.1")
    with pytest.raises(HelixRefusal, match=r"vLLM 0\.19\.1 is not supported.*supported: 0\.32\.0"):
        engine_config(helix=HELIX, **TP4_DCP2)


def test_a_local_version_of_a_supported_one_is_fine():
    compat.check_version("0.32.0+cpu")


def test_a_changed_hook_is_refused_before_any_patch(engine_config, monkeypatch):
    from vllm.model_executor.layers.attention.attention import Attention

    def forward(self, query, key, value):
        raise NotImplementedError

    monkeypatch.setattr(Attention, "forward", forward)
    with pytest.raises(HelixRefusal, match=r"changed .*Attention\.forward.*owned heads"):
        engine_config(helix=HELIX, **TP4_DCP2)


def test_a_vanished_hook_is_refused(engine_config, monkeypatch):
    from vllm.v1.worker.block_table import BlockTable

    monkeypatch.delattr(BlockTable, "compute_slot_mapping")
    with pytest.raises(HelixRefusal, match="it is gone"):
        engine_config(helix=HELIX, **TP4_DCP2)


@pytest.mark.parametrize("dcp", [3, 8])
def test_a_dcp_that_does_not_divide_tp_quotes_our_rule(engine_config, dcp):
    with pytest.raises(
        HelixRefusal, match=rf"TP=4 is not a multiple of DCP={dcp}.*may be 1, 2, 4 .*tp-divisible-by-dcp"
    ):
        engine_config(tensor_parallel_size=4, decode_context_parallel_size=dcp, helix=HELIX)


def test_interleave_is_checked_against_the_default_block_size_too(engine_config):
    with pytest.raises(HelixRefusal, match="24"):
        engine_config(helix=HELIX, block_size=None, cp_kv_cache_interleave_size=24, **TP4_DCP2)


def test_a_backend_that_cpu_does_not_have_is_refused(engine_config):
    with pytest.raises(HelixRefusal, match="TRITON_ATTN does not exist on CPU"):
        engine_config(helix=HELIX, attention_backend="TRITON_ATTN", **TP4_DCP2)


@pytest.mark.parametrize("helix", [HELIX, {}])
def test_queries_are_replicated_for_mla_only(engine_config, helix):
    with pytest.raises(HelixRefusal, match="for MLA models only; LlamaForCausalLM would ignore it"):
        engine_config(helix=helix, dcp_q_replicate=True, model={"num_key_value_heads": 2}, **TP4_DCP2)


def test_an_unknown_fault_is_refused_at_configuration(engine_config):
    with pytest.raises(HelixRefusal, match="no fault is called 'nope'"):
        engine_config(helix={**HELIX, "fault": "nope"}, **TP4_DCP2)


def test_a_door_that_moved_leaves_vllm_as_it_is(caplog):
    """A fresh process in which a hooked object is gone: the plugin says so, and stock vLLM goes on."""
    import subprocess
    import sys

    script = (
        "from vllm.engine.arg_utils import EngineArgs; del EngineArgs.create_engine_config\n"
        "from helix_runtime.vllm_plugin import register; register(); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "alive"
    assert "Helix is not available on this vLLM" in done.stdout + done.stderr


MLA = {"tensor_parallel_size": 4, "decode_context_parallel_size": 4}


@pytest.fixture
def mla_config(engine_config):
    """`mla_config(block_size=64, …)` -> the verified VllmConfig of a small DeepSeek-V2."""
    from harness.models.recipe import find

    def make(helix=HELIX, **arguments):
        return engine_config(helix=helix, model=find("deepseek-v2").config(), **{**MLA, **arguments})

    return make


def test_helix_mla_on_cpu_keeps_what_the_user_asked_for(mla_config):
    config = mla_config(block_size=64, cp_kv_cache_interleave_size=64, max_num_batched_tokens=128)
    assert config.cache_config.block_size == 64
    assert config.cache_config.enable_prefix_caching and config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens == 128


def test_prefix_caching_that_was_switched_off_stays_off(mla_config):
    assert not mla_config(block_size=16, enable_prefix_caching=False).cache_config.enable_prefix_caching


def test_without_the_plugins_backend_vllms_limits_stay(mla_config):
    config = mla_config(helix=None, block_size=64, decode_context_parallel_size=1, max_num_batched_tokens=128)
    assert config.cache_config.block_size == 16
    assert not config.cache_config.enable_prefix_caching and not config.scheduler_config.enable_chunked_prefill


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"block_size": 24}, "multiple of 16"),
        ({"block_size": 16, "cp_kv_cache_interleave_size": 64}, "64 does not divide the block size 16"),
        ({"block_size": None, "cp_kv_cache_interleave_size": 64}, "64 does not divide the block size 16"),
    ],
)
def test_blocks_that_cpu_mla_cannot_read_are_refused(mla_config, arguments, sentence):
    with pytest.raises(HelixRefusal, match=sentence):
        mla_config(**arguments)


@pytest.mark.parametrize(
    ("backend", "helix_mode", "admitted"),
    [("FLASH_ATTN", True, True), ("FLASHINFER", True, False), (None, True, False), ("FLASH_ATTN", False, False)],
)
def test_overlap_on_cuda_is_refused_where_nothing_cuts_the_batch(backend, helix_mode, admitted):
    from types import SimpleNamespace

    from helix_runtime.vllm_plugin.gate import _admit_on_cuda
    from helix_runtime.vllm_plugin.options import HelixOptions

    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=backend and SimpleNamespace(name=backend)),
        model_config=SimpleNamespace(use_mla=False, enforce_eager=True),
        compilation_config=SimpleNamespace(cudagraph_mode=None),
    )
    options = HelixOptions(helix_mode=helix_mode, overlap=3)
    if admitted:
        return _admit_on_cuda(config, options)
    with pytest.raises(HelixRefusal, match="--attention-backend FLASH_ATTN only" if backend else "backend"):
        _admit_on_cuda(config, options)


#: Fresh process: vLLM on a stand-in for a Hopper GPU builds the configuration of one backend after the other.
ON_HOPPER = """
import json, sys
import emulated_cuda
emulated_cuda.install()
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from helix_runtime.vllm_plugin import register
from helix_runtime.vllm_plugin.refusal import HelixRefusal
register()
for capability, backend in json.loads(sys.argv[2]):
    type(current_platform).get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(*capability))
    try:
        EngineArgs(
            model=sys.argv[1], skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=1024,
            block_size=64, tensor_parallel_size=4, decode_context_parallel_size=4, attention_backend=backend,
            distributed_executor_backend="mp", additional_config={"helix": {"helix_mode": True, "share_gpu": True}},
        ).create_engine_config()
        print("SAID admitted")
    except HelixRefusal as refusal:
        print("SAID", str(refusal).replace("\\n", " "))
"""


def test_a_backend_of_other_hardware_is_refused_with_the_rule_of_vllms_source(model_folder):
    """What CUTLASS_MLA runs on, say, is told before a start, as the cell of `known-limitations` declares it."""
    import json
    import os
    import subprocess
    import sys
    from pathlib import Path

    pytest.importorskip("triton", reason="vLLM's CUDA platform needs Triton; not installed")
    pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")
    from harness.models.recipe import find

    asked = [
        ((9, 0), "CUTLASS_MLA"), ((9, 0), "FLASHINFER_MLA"), ((12, 0), "CUTLASS_MLA"), ((10, 0), "FLASHMLA"),
        ((10, 0), "CUTLASS_MLA"), ((9, 0), "FLASHMLA_SPARSE"), ((8, 0), "TRITON_MLA"), ((7, 5), "TRITON_MLA"),
        ((9, 0), "FLASHMLA"),
    ]  # fmt: skip
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", ON_HOPPER, model_folder(**find("deepseek-v2").config()), json.dumps(asked)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here}"},
    )  # fmt: skip
    said = [line.removeprefix("SAID ") for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert len(said) == len(asked), done.stderr[-4000:]
    rules = (
        ("CUTLASS_MLA", "hopper", "cutlass_mla", "10.x only"),
        ("FLASHINFER_MLA", "hopper", "flashinfer_mla", "10.x only"),
        ("CUTLASS_MLA", "blackwell-rtx", "cutlass_mla", "10.x only"),
        ("FLASHMLA", "blackwell", "flashmla", "9.x"),
    )
    for text, (backend, hardware, file, rule) in zip(said[:4], rules, strict=True):
        assert text.startswith(f"{backend} on {hardware} does not support helix-mla with vLLM 0.32.0"), text
        assert f"it needs compute capability {rule}" in text
        assert f"[v1/attention/backends/mla/{file}.py: supports_compute_capability]" in text
    # It runs there, and no cell has judged it.
    assert said[4].startswith("no cell has proved Helix for MLA models with CUTLASS_MLA on CUDA")
    assert "with FLASHMLA_SPARSE on CUDA" in said[5]  # not in the table
    assert "no cell has proved it below" in said[6] and "compute capability 7.5 is in no family" in said[7]
    assert said[8] == "admitted"
