"""A legal layout: rank maps, KV bytes, duplication, flags, and what it buys. `layout.resolve_layout` makes them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from helix_runtime import capabilities
from helix_runtime.capabilities import HELIX_GQA, HELIX_MLA, STANDARD_DCP, STANDARD_TP, Support
from helix_runtime.layout_rules import Proposal, first_broken

#: Values of DeepSeek's latent per token and layer: kv_lora_rank 512 + qk_rope_head_dim 64.
DEFAULT_LATENT = 576


@dataclass(frozen=True, kw_only=True)
class Layout(Proposal):
    """A legal layout. Only `resolve_layout` and `legal_layouts` make these. For MLA `num_kv_heads` is 1, the latent."""

    def kvp_rank(self, rank: int) -> int:
        """Which shard of the sequence `rank` holds."""
        return self._check(rank) % self.kvp

    def tpa_rank(self, rank: int) -> int:
        """Which shard of the heads `rank` computes."""
        return self._check(rank) // self.kvp

    @property
    def kvp_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that share heads and split the sequence between them (they exchange partial results): consecutive."""
        return tuple(tuple(range(first, first + self.kvp)) for first in range(0, self.tp, self.kvp))

    @property
    def tpa_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same shard of the sequence and split the heads between them."""
        return tuple(tuple(range(first, self.tp, self.kvp)) for first in range(self.kvp))

    def query_heads_computed(self, rank: int) -> range:
        """Query heads whose partial attention `rank` computes over its shard: Q / TPA of them.

        In standard DCP these are the heads that its group gathers before attention; in Helix it projects them itself.
        """
        return _share(self.tpa_rank(rank), self.num_query_heads // self.tpa)

    def query_heads_owned(self, rank: int) -> range:
        """Query heads whose merged output `rank` holds after the exchange: its `o_proj` shard, Q / TP of them."""
        return _share(self._check(rank), self.num_query_heads // self.tp)

    def query_heads_projected(self, rank: int) -> range:
        """Query heads that the Q projection of `rank` makes: the computed ones in Helix, else the owned ones."""
        return self.query_heads_computed(rank) if self.helix_mode else self.query_heads_owned(rank)

    def kv_heads(self, rank: int) -> range:
        """KV heads that `rank` caches for its shard of the sequence (MLA: the one latent)."""
        if self.tpa <= self.num_kv_heads:
            return _share(self.tpa_rank(rank), self.num_kv_heads // self.tpa)
        return _share(self.tpa_rank(rank) * self.num_kv_heads // self.tpa, 1)

    @property
    def duplication(self) -> int:
        """How many ranks of the TP group hold each KV value."""
        return max(1, self.tpa // self.num_kv_heads)

    @property
    def kv_capacity_factor(self) -> float:
        """Tokens that fit, as a multiple of standard TP on the same ranks. GQA Helix: max(1, TP / K). MLA: KVP."""
        standard = max(1.0, self.num_kv_heads / self.tp)
        return standard / (len(self.kv_heads(0)) / self.kvp)

    @property
    def kv_bytes_per_token_layer(self) -> float | None:
        """Bytes that one layer caches on one GPU for each token of the whole sequence, on average over the shards.

        K and V of the cached heads (MLA: one latent), divided by KVP. None for GQA without `head_size`.
        """
        if self.use_mla:
            values = self.latent_size or DEFAULT_LATENT
        elif self.head_size is None:
            return None
        else:
            values = 2 * len(self.kv_heads(0)) * self.head_size
        return values * self.kv_dtype_bytes / self.kvp

    @property
    def kv_bytes_per_token(self) -> float | None:
        """`kv_bytes_per_token_layer` over all layers; None without `num_layers` or `head_size`."""
        if self.num_layers is None or self.kv_bytes_per_token_layer is None:
            return None
        return self.num_layers * self.kv_bytes_per_token_layer

    def to_args(self) -> tuple[str, ...]:
        """The `vllm serve` flags of this layout. On CPU the plugin picks the backend: there is no flag for it."""
        args = ["--tensor-parallel-size", str(self.tp)]
        if self.kvp > 1:
            args += ["--decode-context-parallel-size", str(self.kvp)]
        if self.helix_mode:
            args += ["--helix-mode"]
        if self.attention_backend and self.hardware != "cpu" and not self.attention_backend.startswith("HELIX_CPU"):
            args += ["--attention-backend", self.attention_backend]
        if self.kvp > 1 and self.interleave_size > 1:
            args += ["--cp-kv-cache-interleave-size", str(self.interleave_size)]
        if self.mode == HELIX_GQA and self.tpa == 1:
            args += ["--additional-config", '{"helix": {"allow_gqa_tpa1": true}}']
        return tuple(args)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the layout buys, what it does not, and what is known to be weak about it."""
        return tuple(_notes(self))

    def _check(self, rank: int) -> int:
        if not 0 <= rank < self.tp:
            raise ValueError(f"rank {rank} is not in this layout: TP={self.tp}, ranks 0 to {self.tp - 1}")
        return rank


def _notes(layout: Layout) -> Iterator[str]:
    tp, kvp, tpa, heads = layout.tp, layout.kvp, layout.tpa, layout.num_kv_heads
    factor = f"{layout.kv_capacity_factor:g}x"
    if layout.mode == HELIX_MLA:
        yield f"KV capacity grows {factor}: standard TP keeps {tp} copies of the latent cache, this layout one"
    elif layout.mode == STANDARD_DCP:
        copies = f"{layout.duplication} copies" if layout.duplication > 1 else "one copy"
        yield f"KV capacity grows {factor}: {copies} of each KV value instead of {layout.duplication * kvp}"
    elif layout.mode == STANDARD_TP:
        if layout.duplication > 1:
            yield f"each KV value is held {layout.duplication} times: context parallelism could use that memory"
    elif tp <= heads:
        yield (
            f"TP={tp} <= K={heads}: standard TP already holds each KV head once, so this layout buys no KV capacity; "
            f"it shards the sequence {kvp} ways at the cost of an exchange in every layer"
        )
    else:
        yield f"KV capacity grows {factor}: max(1, TP / K), as standard TP would hold each KV head more than once"
    if layout.mode == HELIX_GQA:
        if tpa == heads and not first_broken(replace(layout, helix_mode=False)):
            yield "stock DCP with the same sizes caches the same KV; it gathers queries in every layer instead"
        if tpa == 1:
            yield "TPA=1 for GQA is a documented limit of the original design, allowed here by allow_gqa_tpa1"
        if max(tp, heads) % min(tp, heads):
            yield f"standard TP={tp} cannot serve {heads} KV heads, so there is no baseline with the same TP"
    if layout.attention_backend and layout.hardware:
        row = capabilities.declare(
            layout.attention_backend, layout.hardware, layout.mode, vllm_version=layout.vllm_version
        )
        if row.support is Support.KNOWN_LIMITATION:
            yield f"known limitation: {row.reason} [{row.source}]"


def _share(index: int, size: int) -> range:
    return range(index * size, (index + 1) * size)
