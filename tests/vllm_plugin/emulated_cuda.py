"""A stand-in for a Hopper GPU on a host without one: vLLM's own CUDA code runs, only compiled kernels are replaced.

`install()` before anything of vLLM is imported. From there on vLLM believes that it runs on CUDA, on tensors that lie
on the CPU: its platform, backends, metadata builders, wrappers and collectives are the real ones, and so are its Triton
kernels (interpreted). FlashAttention 3, FlashMLA, FlashInfer and the cache kernels are plain torch with the arguments,
shapes, dtypes, LSE layouts and LSE bases of the real ones; what these leave undefined (an empty shard) is NaN here.
"""

import importlib.machinery
import math
import os
import sys
from types import ModuleType, SimpleNamespace

import torch


def install() -> None:
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_HAS_FLASHINFER_CUBIN": "1"}
    extensions = ("_C_stable_libtorch", "_moe_C_stable_libtorch", "_qutlass_C", "_flashmla_C", "_flashmla_extension_C")
    for name in (*extensions, "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C"):
        _module(f"vllm.{name}")
    _module("vllm.third_party.flashmla.flash_mla_interface", **_flash_mla())
    for name, contents in _flashinfer().items():
        _module(name, **contents)

    _interpret_more()

    import vllm.platforms as platforms

    platforms.vllm_version_matches_substr = lambda substring: False  # it would switch Triton off
    platforms.current_platform = _hopper()
    torch.ops._vllm_fa3_C.fwd = _fa3_forward
    torch.ops._vllm_fa3_C.get_scheduler_metadata = _fa3_schedule
    torch.ops._C_cache_ops.reshape_and_cache_flash = _reshape_and_cache_flash
    torch.ops._C_cache_ops.concat_and_cache_mla = _concat_and_cache_mla
    torch.ops._C_cache_ops.cp_gather_cache = _cp_gather_cache
    torch.ops._C.get_cuda_view_from_cpu_tensor = lambda tensor: tensor
    for name in ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8"):
        setattr(torch.ops._C, name, lambda capability: False)
    torch.accelerator.empty_cache = lambda: None
    torch.ops._C.silu_and_mul = None  # looked up when a model is built
    from vllm.config.compilation import PassConfig
    from vllm.v1.attention.ops import merge_attn_states

    PassConfig.flashinfer_max_size = lambda self, ranks: None  # of an all-reduce that shared GPUs do without
    torch.ops._C.merge_attn_states = _merged_states(merge_attn_states._merge_attn_states_torch)


def _module(name: str, **contents) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def _interpret_more() -> None:
    """What vLLM's kernels ask of Triton that its interpreter lacks.

    A mask is 0 and 1 in integers where a flag was loaded and negated; launchers count a kernel's constants; bf16 is
    kept as 16 bits, which a product must not take for integers.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    def boolean(original, place):
        def call(self, *args):
            args[place].data = args[place].data.astype(bool)
            return original(self, *args)

        return call

    InterpreterBuilder.create_masked_load = boolean(InterpreterBuilder.create_masked_load, 1)
    InterpreterBuilder.create_masked_store = boolean(InterpreterBuilder.create_masked_store, 2)
    product = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return product(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot
    InterpretedFunction.constexprs = property(
        lambda self: [name for name, kind in self.fn.__annotations__.items() if "constexpr" in str(kind)]
    )


def _hopper():
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Hopper(NonNvmlCudaPlatform):
        device_name = device_type = "cpu"
        dispatch_key = "CPU"
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 80 << 30)
        num_compute_units = classmethod(lambda cls, device_id=0: 132)
        device_count = classmethod(lambda cls: 1)
        is_pin_memory_available = classmethod(lambda cls: False)

    return Hopper()


def _attend(query, key, value, scale, visible=None):
    """query [q, H, D], key and value [k, K, D] or [k, K, Dv], visible [q, k] -> fp64 output [q, H, Dv], LSE [q, H]."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(group, 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->qhk", query.double(), key) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("qhk,khd->qhd", (scores - lse[..., None]).exp(), value), lse


def _pages(cache, block_table, length: int):
    """The first `length` tokens of a request in cache [blocks, page, K, D]."""
    page = cache.shape[1]
    blocks = block_table[: -(-length // page)].long()
    return cache[blocks].flatten(0, 1)[:length]


# FlashAttention 3. LSE: natural, fp32, [H, T].


def _fa3_schedule(batch_size, max_q, max_k, heads_q, heads_kv, headdim, headdim_v, dtype, cache_seqlens, *rest):
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (batch_size,) and heads_q % heads_kv == 0
    return SimpleNamespace(heads=(heads_q, heads_kv), headdim=headdim, lengths=cache_seqlens.clone())


def _fa3_forward(
    q, k, v, k_new, v_new, q_v, out, cu_q, cu_k, cu_k_new, used_q, used_k, max_q, max_k, block_table, batch_idx,
    leftpad, rotary_cos, rotary_sin, rotary_lens, q_descale, k_descale, v_descale, scale, causal, left, right, softcap,
    interleaved, schedule, num_splits, pack_gqa, sm_margin, sinks, cp_world_size, cp_rank, cp_total,
):  # fmt: skip
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert cu_q.dtype == torch.int32 and (left, right) == (-1, -1) and not softcap and sinks is None
    assert q.shape[-1] == k.shape[-1] and q.shape[1] % k.shape[2 if block_table is not None else 1] == 0
    if schedule is not None:
        assert schedule.heads == (q.shape[1], k.shape[2]) and schedule.headdim == q.shape[-1], schedule
        assert torch.equal(schedule.lengths, used_k)
    if max_q == 1:
        causal = False  # as `mha_fwd` does: one query sees all keys
    output = torch.full((*q.shape[:2], v.shape[-1]), math.nan)
    lse = torch.full(q.shape[:2], math.inf)
    for row, (start, end) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)):
        assert end - start <= max_q
        if block_table is not None:
            length = int(used_k[row])
            keys, values = (_pages(cache, block_table[row], length) for cache in (k, v))
        else:
            first, length = int(cu_k[row]), int(cu_k[row + 1] - cu_k[row])
            keys, values = k[first : first + length], v[first : first + length]
        assert length <= max_k, (length, max_k)
        if not length or start == end:
            continue
        queries = q[start:end]
        if q_v is not None:  # absorbed MLA: scores are q.k + q_v.v
            queries, keys = torch.cat([queries, q_v[start:end]], -1), torch.cat([keys, values], -1)
        visible = None
        if causal:
            position, total = torch.arange(length), length
            if cp_world_size > 1:  # of tokens that are dealt one by one
                position, total = position * cp_world_size + cp_rank, int(cp_total[row])
            visible = position <= torch.arange(total - (end - start), total)[:, None]
        output[start:end], lse[start:end] = (part.float() for part in _attend(queries, keys, values, scale, visible))
    lse, output = torch.where(lse == -math.inf, math.inf, lse), output.to(q.dtype)
    return (out.copy_(output) if out is not None else output), lse.T.contiguous(), None, None


# FlashMLA, dense. LSE: natural, fp32, [B, H, S].


def _flash_mla() -> dict:
    class FlashMLASchedMeta:
        tile_scheduler_metadata = num_splits = None

    def get_mla_metadata(*args, **kwargs):
        return FlashMLASchedMeta(), None

    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, is_fp8_kvcache=False,
    ):  # fmt: skip
        batch, queries, heads, width = q.shape
        assert k_cache.shape[1:] == (64, 1, 576) and width == 576 and head_dim_v == 512, k_cache.shape
        assert queries == 1 and q.dtype == k_cache.dtype == torch.bfloat16 and block_table.dtype == torch.int32
        assert isinstance(tile_scheduler_metadata, FlashMLASchedMeta) and cache_seqlens.shape == (batch,)
        output, lse = torch.full((batch, 1, heads, 512), math.nan), torch.full((batch, heads, 1), math.inf)
        for row, length in enumerate(cache_seqlens.tolist()):
            if length:
                keys = _pages(k_cache, block_table[row], length)
                partial, natural = _attend(q[row], keys, keys[..., :512], softmax_scale)
                output[row], lse[row] = partial.float(), natural.T.float()
        return output.to(q.dtype), lse

    names = ("flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func")
    others = dict.fromkeys((*names, "flash_mla_sparse_fwd"))
    return {**others, **{f.__name__: f for f in (FlashMLASchedMeta, get_mla_metadata, flash_mla_with_kvcache)}}


# FlashInfer. LSE: base 2, fp32, [T, H].


class _Planned:
    """What every wrapper of FlashInfer remembers of its plan, by the names that vLLM reads."""

    def _remember(self, *, num_qo_heads, num_kv_heads, causal, sm_scale, window_left, logits_soft_cap, q_data_type):
        assert num_qo_heads % num_kv_heads == 0 and q_data_type == torch.bfloat16, (num_qo_heads, num_kv_heads)
        self._heads, self._causal, self._sm_scale = (num_qo_heads, num_kv_heads), causal, sm_scale
        self._window_left, self._logits_soft_cap = window_left, logits_soft_cap or 0.0

    def _attended(self, query, rows, out, lse, return_lse):
        """rows: for each request its (start, end, keys, values)."""
        output = torch.full((*query.shape[:2], rows[0][3].shape[-1]), math.nan)
        found = torch.full(query.shape[:2], -math.inf)
        for start, end, keys, values in rows:
            assert (query.shape[1], keys.shape[1]) == self._heads, (query.shape, keys.shape, self._heads)
            if len(keys) and end > start:
                visible = torch.arange(len(keys)) <= torch.arange(len(keys) - end + start, len(keys))[:, None]
                partial, natural = _attend(
                    query[start:end], keys, values, self._sm_scale, visible if self._causal else None
                )
                output[start:end], found[start:end] = partial.float(), (natural / math.log(2)).float()
        output = output.to(query.dtype)
        if out is not None:
            assert out.shape == output.shape and out.dtype == output.dtype
            output = out.copy_(output)
        if lse is not None:
            found = lse.copy_(found)
        return (output, found) if return_lse else output


class _Paged(_Planned):
    def __init__(self, workspace, kv_layout="NHD", backend="auto", use_tensor_cores=False, use_cuda_graph=False, **how):
        self.kv_layout, self.is_cuda_graph_enabled = kv_layout, use_cuda_graph
        self._pin_memory_int_workspace_buffer = torch.zeros(8, dtype=torch.uint8)

    def _read(self, cache):
        heads_first = self.kv_layout == "HND"
        keys, values = (part.transpose(1, 2) if heads_first else part for part in cache)
        assert keys.shape[1] == self._page_size
        spans = zip(self._indptr[:-1].tolist(), self._indptr[1:].tolist(), self._last.tolist(), strict=True)
        lengths = [max(end - start - 1, 0) * self._page_size + last for start, end, last in spans]
        tables = [self._indices[start:] for start in self._indptr[:-1].tolist()]
        return [
            (_pages(keys, table, length), _pages(values, table, length))
            for table, length in zip(tables, lengths, strict=True)
        ]


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, *, causal=False, sm_scale=None, window_left=-1, logits_soft_cap=None, q_data_type,
        kv_data_type, o_data_type=None, seq_lens=None, fixed_split_size=-1, disable_split_kv=False,
    ):  # fmt: skip
        self._qo, self._indptr, self._indices = qo_indptr.clone(), paged_kv_indptr.clone(), paged_kv_indices.clone()
        self._last, self._page_size = paged_kv_last_page_len.clone(), page_size
        self._remember(
            num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, causal=causal, sm_scale=sm_scale,
            window_left=window_left, logits_soft_cap=logits_soft_cap, q_data_type=q_data_type,
        )  # fmt: skip

    def run(self, q, paged_kv_cache, *, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False):
        spans = zip(self._qo[:-1].tolist(), self._qo[1:].tolist(), self._read(paged_kv_cache), strict=True)
        return self._attended(q, [(start, end, *read) for start, end, read in spans], out, lse, return_lse)


class BatchPrefillWithRaggedKVCacheWrapper(_Planned):
    def __init__(self, workspace, kv_layout="NHD"):
        self._pin_memory_int_workspace_buffer = torch.zeros(8, dtype=torch.uint8)

    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, *, causal=False,
        sm_scale=None, window_left=-1, logits_soft_cap=None, q_data_type,
    ):  # fmt: skip
        assert torch.equal(qo_indptr, kv_indptr) and head_dim_vo in (None, head_dim_qk)
        self._qo = qo_indptr.clone()
        self._remember(
            num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, causal=causal, sm_scale=sm_scale,
            window_left=window_left, logits_soft_cap=logits_soft_cap, q_data_type=q_data_type,
        )  # fmt: skip

    def run(self, q, k, v, *, out=None, lse=None, return_lse=False):
        spans = zip(self._qo[:-1].tolist(), self._qo[1:].tolist(), strict=True)
        return self._attended(q, [(a, b, k[a:b], v[a:b]) for a, b in spans], out, lse, return_lse)


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type, kv_data_type, o_data_type,
        data_type=None, sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True, block_tables=None,
        seq_lens=None, fixed_split_size=-1, disable_split_kv=False,
    ):  # fmt: skip
        self._indptr, self._indices, self._last = indptr.clone(), indices.clone(), last_page_len.clone()
        self._page_size = page_size
        self._remember(
            num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, causal=False, sm_scale=sm_scale,
            window_left=window_left, logits_soft_cap=logits_soft_cap, q_data_type=q_data_type,
        )  # fmt: skip

    def run(
        self, q, paged_kv_cache, *, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        kv_cache_sf=None, sinks=None,
    ):  # fmt: skip
        rows = [(row, row + 1, *read) for row, read in enumerate(self._read(paged_kv_cache))]
        return self._attended(q, rows, out, lse, return_lse)


def _flashinfer() -> dict[str, dict]:
    def get_seq_lens(indptr, last_page_len, page_size):
        return (indptr[1:] - indptr[:-1] - 1).clamp(min=0) * page_size + last_page_len

    wrappers = (
        BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper, BatchDecodeWithPagedKVCacheWrapper,
    )  # fmt: skip
    top = {wrapper.__name__: wrapper for wrapper in wrappers} | {"get_seq_lens": get_seq_lens, "__path__": []}
    top |= {"BatchAttentionWithAttentionSinkWrapper": type("BatchAttentionWithAttentionSinkWrapper", (), {})}
    return {
        "flashinfer": top | {"nvfp4_quantize_append_paged_kv_cache_with_slot_mapping": None},
        "flashinfer.decode": {"fast_decode_plan": None, "trtllm_batch_decode_with_kv_cache": None},
        "flashinfer.prefill": {"trtllm_batch_context_with_kv_cache": None},
        "flashinfer.utils": {"FP4Tensor": None},
    }


# The cache, and the merge of context with new tokens.


def _reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    """key [T or more, K, D] -> key_cache [blocks, page, K, D]; -1 is written nowhere."""
    assert slot_mapping.dtype == torch.int64
    mine = (slot_mapping >= 0).nonzero()[:, 0]
    block, offset = slot_mapping[mine] // key_cache.shape[1], slot_mapping[mine] % key_cache.shape[1]
    key_cache[block, offset], value_cache[block, offset] = key[mine], value[mine]


def _concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale):
    mine = (slot_mapping >= 0).nonzero()[:, 0]
    block, offset = slot_mapping[mine] // kv_cache.shape[1], slot_mapping[mine] % kv_cache.shape[1]
    kv_cache[block, offset] = torch.cat([kv_c[mine], k_pe[mine]], -1)


def _cp_gather_cache(src_cache, dst, block_table, cu_seq_lens, batch_size, seq_starts=None):
    page = src_cache.shape[1]
    for row in range(batch_size):
        start, end = cu_seq_lens[row : row + 2].tolist()
        index = torch.arange(end - start) + (int(seq_starts[row]) if seq_starts is not None else 0)
        dst[start:end] = src_cache[block_table[row, index // page].long(), index % page]


def _merged_states(merge):
    def merge_attn_states(output, output_lse, prefix_output, prefix_lse, suffix_output, suffix_lse, *rest):
        assert all(part.stride(-1) == 1 for part in (output, prefix_output, suffix_output))
        merge(output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse, rest[0] if rest else None)

    return merge_attn_states
