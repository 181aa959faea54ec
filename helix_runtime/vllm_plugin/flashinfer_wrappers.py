"""What stands in FLASHINFER's hook for a gather of queries, for the wrapper of new tokens, and for a schedule's memory.

Needs torch alone."""

import torch

from helix_runtime.vllm_plugin.owned_kv_heads import owned_kv_heads


class QueriesAreThere:
    """The DCP group as the backend's query gather sees it under Helix: every rank holds its group's queries already."""

    def all_gather(self, query: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim % query.dim() == query.dim() - 2, (dim, query.shape)  # heads
        return query


def schedule_in_plain_memory(wrapper) -> None:
    """Let FlashInfer write a wrapper's schedule to memory that is not page-locked, so that its copy is taken at once.

    `plan` fills one page-locked buffer, uint8 on the host, and queues its copy to the device. The next `plan` fills it
    again, while that copy still waits if the device is a step behind, as may be under vLLM's asynchronous scheduling;
    the step before then reads the schedule of the step after: wrong answers, or addresses that do not exist. From plain
    memory the driver takes the bytes before the call returns. A wrapper that has plain memory already is left alone.
    Source: FlashInfer 0.7 `attention/scheduler.cuh`; vllm#40756. Raises AttributeError where there is no such buffer.
    """
    buffer = wrapper._pin_memory_int_workspace_buffer
    if buffer.is_pinned():
        plain = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        wrapper._pin_memory_int_workspace_buffer = plain


class OwnedHeads:
    """FlashInfer's wrapper for new tokens, narrowed to the query heads that this rank owns and the KV heads they read.

    `plan` gets Q/TP query heads (the builder's) and K/TPA KV heads (the layer's); `run` gets query [T, Q/TPA, D], key
    and value [T, K/TPA, D], and returns (output [T, Q/TP, D], LSE [T, Q/TP] in base 2).
    """

    def __init__(self, wrapper, kvp: int, kvp_rank: int):
        self._wrapper, self._kvp, self._kvp_rank = wrapper, kvp, kvp_rank

    def __getattr__(self, name: str):
        return getattr(self._wrapper, name)

    def plan(self, *, num_qo_heads: int, num_kv_heads: int, **how) -> None:
        heads = self._heads(num_qo_heads * self._kvp, num_kv_heads)
        read = heads.stop - heads.start if isinstance(heads, slice) else len(heads)
        self._wrapper.plan(num_qo_heads=num_qo_heads, num_kv_heads=read, **how)

    def run(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how):
        owned = query.shape[1] // self._kvp
        first = self._kvp_rank * owned
        heads = self._heads(query.shape[1], key.shape[1])
        mine = query[:, first : first + owned].contiguous()
        return self._wrapper.run(mine, key[:, heads].contiguous(), value[:, heads].contiguous(), **how)

    def _heads(self, num_heads: int, num_kv_heads: int) -> slice | list[int]:
        return owned_kv_heads(num_heads, num_kv_heads, self._kvp, self._kvp_rank)
