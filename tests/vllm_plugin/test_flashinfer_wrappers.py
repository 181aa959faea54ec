"""FLASHINFER's wrappers under Helix, on a stand-in for FlashInfer that attends in plain torch: no GPU is needed."""

import pytest
import torch

from helix_runtime.attention import dense_attention_fp64
from helix_runtime.vllm_plugin.flashinfer_wrappers import OwnedHeads, QueriesAreThere, schedule_in_plain_memory


class Ragged:
    """FlashInfer's contract for one request: `run` must be given the heads that `plan` was told."""

    device = "cpu"

    def plan(self, *, num_qo_heads, num_kv_heads, **how):
        assert num_qo_heads % num_kv_heads == 0
        self.planned, self.how = (num_qo_heads, num_kv_heads), how

    def run(self, query, key, value, return_lse):
        assert (query.shape[1], key.shape[1]) == self.planned and return_lse
        assert all(part.is_contiguous() for part in (query, key, value))
        return dense_attention_fp64(query, key, value, scale=0.5, causal=True)


@pytest.mark.parametrize("dim", [1, -2])
def test_the_gather_of_queries_gives_them_back_however_its_dimension_is_named(dim):
    query = torch.randn(5, 8, 16)
    assert QueriesAreThere().all_gather(query, dim=dim) is query


@pytest.mark.parametrize("dim", [0, 2, -1])
def test_a_gather_of_anything_else_is_loud(dim):
    with pytest.raises(AssertionError):
        QueriesAreThere().all_gather(torch.randn(5, 8, 16), dim=dim)


@pytest.mark.parametrize("heads, kv_heads, kvp", [(8, 2, 2), (8, 1, 4), (16, 8, 4), (6, 3, 2), (8, 4, 8)])
def test_each_rank_attends_its_own_heads_of_the_new_tokens(heads, kv_heads, kvp):
    """Together the ranks give what one wrapper over all heads gives: no head of another query's KV is read."""
    query = torch.randn(7, heads, 16)
    key, value = torch.randn(7, kv_heads, 16), torch.randn(7, kv_heads, 16)
    parts = []
    for rank in range(kvp):
        wrapper = OwnedHeads(Ragged(), kvp, rank)
        wrapper.plan(num_qo_heads=heads // kvp, num_kv_heads=kv_heads, causal=True)
        assert wrapper.how == {"causal": True} and wrapper.device == "cpu"
        parts.append(wrapper.run(query, key, value, return_lse=True))
    whole, whole_lse = dense_attention_fp64(query, key, value, scale=0.5, causal=True)
    torch.testing.assert_close(torch.cat([output for output, _ in parts], 1), whole)
    torch.testing.assert_close(torch.cat([lse for _, lse in parts], 1), whole_lse)


def test_a_page_locked_schedule_goes_to_plain_memory_of_the_same_size_once():
    """A CPU build has no page-locked memory: a tensor that says it is stands for one."""

    class Pinned(torch.Tensor):
        def is_pinned(self):
            return True

    wrapper = Ragged()
    wrapper._pin_memory_int_workspace_buffer = pinned = torch.zeros(64, dtype=torch.uint8).as_subclass(Pinned)
    schedule_in_plain_memory(wrapper)
    plain = wrapper._pin_memory_int_workspace_buffer
    assert (plain.shape, plain.dtype) == (pinned.shape, pinned.dtype) and not plain.is_pinned()
    schedule_in_plain_memory(wrapper)
    assert wrapper._pin_memory_int_workspace_buffer is plain
    with pytest.raises(AttributeError):
        schedule_in_plain_memory(Ragged())
