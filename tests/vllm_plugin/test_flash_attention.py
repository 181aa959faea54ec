"""What FLASH_ATTN's hook counts, through the hook itself on a stand-in for the backend: no GPU is needed to count."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")

from helix_runtime.proof import COUNTERS, ProofWriter
from helix_runtime.vllm_plugin import cuda_combine, flash_attention
from helix_runtime.vllm_plugin.faults import NOTHING_ARMED


@pytest.fixture
def proof(monkeypatch):
    writer = ProofWriter(None, 0)
    context = SimpleNamespace(helix=False, proof=writer, armed=NOTHING_ARMED)
    for module in (flash_attention, cuda_combine):
        monkeypatch.setattr(module, "current", lambda: context)
    return writer


def counted(proof) -> dict[str, int]:
    return {name: int(value) for name, value in zip(COUNTERS, proof._counters, strict=True) if value}


def upstream(impl, query, key, value, key_cache, value_cache, output, metadata):
    """As vLLM's: a batch with context is merged, one without any returns before."""
    return impl.dcp_combine("partial", "lse") if metadata.max_dcp_context_kv_len else None


@pytest.mark.parametrize(("helix", "full", "told"), [(True, True, False), (True, False, True), (False, True, True)])
def test_a_builder_of_full_graphs_never_leaves_the_context_out(monkeypatch, helix, full, told):
    """vLLM captures with requests that have no context; what is not in the graph is in no replay."""
    monkeypatch.setattr(flash_attention, "current", lambda: SimpleNamespace(helix=helix))
    batch = SimpleNamespace(seq_lens_cpu_upper_bound="bound")
    batch.replace = lambda **changes: SimpleNamespace(**{**vars(batch), **changes})
    builder = SimpleNamespace(use_full_cuda_graph=full)
    seen = flash_attention._build(lambda self, prefix, common, fast: common)(builder, 0, batch)
    assert (seen.seq_lens_cpu_upper_bound == "bound") is told and batch.seq_lens_cpu_upper_bound == "bound"


def test_vllm_decides_by_that_bound_and_captures_without_context():
    """What vLLM 0.32 captures a decode graph with, and what its builder would make of that."""
    import torch
    from vllm.v1.worker.cp_utils import should_skip_dcp_context_attention
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    buffers = InputBuffers(max_num_reqs=4, max_num_tokens=8, device=torch.device("cpu"))
    dummy = InputBatch.make_dummy(2, 2, buffers, max_query_len=1)
    context = dummy.seq_lens_cpu_upper_bound - torch.from_numpy(dummy.num_scheduled_tokens)
    assert should_skip_dcp_context_attention(context)


def call(impl, query_len: int, context: int, forward=upstream):
    metadata = SimpleNamespace(max_query_len=query_len, max_dcp_context_kv_len=context)
    return flash_attention._forward_with_dcp(forward)(impl, *[None] * 6, metadata)


def test_a_combine_is_counted_where_it_is_called(proof):
    impl = SimpleNamespace(dcp_combine=lambda output, lse: (output, lse))
    assert call(impl, 1, 40) == ("partial", "lse")
    call(impl, 1, 41)
    call(impl, 9, 33)
    assert counted(proof) == {
        "decode_attention": 2, "decode_combine": 2, "prefill_attention": 1, "prefill_combine": 1,
    }  # fmt: skip


def test_a_batch_of_new_requests_is_prefill_even_of_one_token_each(proof):
    impl = SimpleNamespace(dcp_combine=None)
    call(impl, 1, 0)
    call(impl, 7, 0)
    assert counted(proof) == {"prefill_attention": 2}


def test_a_combine_that_never_runs_is_not_counted(proof):
    impl = SimpleNamespace(dcp_combine=lambda output, lse: (output, lse))
    call(impl, 1, 40, forward=lambda *arguments: "its own partial")
    assert counted(proof) == {}
