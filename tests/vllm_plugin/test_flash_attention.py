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
