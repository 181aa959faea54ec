"""How many weights a model has, by the way in which they are sharded. Elements, not bytes."""

from dataclasses import dataclass

from helix_runtime.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One layer's attention, then its FFN, then what stands outside the layers."""

    query: float  # Wq (MLA: its up-projection and W_UK), split over the shards of query heads
    kv_head: float  # Wk and Wv of one KV head; MLA: 0
    latent: float  # MLA's down-projections, which every rank holds; else 0
    value: float  # MLA's W_UV, split as the output projection; else 0
    output: float  # Wo
    dense_ffn: float  # of a dense layer; 0 where there is none
    dense_layers: int
    router: float  # of an MoE layer, which every rank holds
    shared: float  # its shared experts
    expert: float  # one routed expert
    routed: int
    per_token: int
    moe_layers: int
    embedding: float  # input embedding
    head: float  # output embedding; 0 where it is the input's

    @property
    def total(self) -> float:
        """All parameters but norms and biases. `kv_head` counts once a KV head: see `attention`."""
        moe = self.router + self.shared + self.routed * self.expert
        return self.dense_layers * self.dense_ffn + self.moe_layers * moe + self.embedding + self.head

    def attention(self, kv_heads: int) -> float:
        """One layer's attention, unsharded."""
        return self.query + self.kv_head * kv_heads + self.latent + self.value + self.output


def weights_of(shape: ModelShape) -> Weights:
    """Counted from the shape's sizes."""
    hidden, heads = shape.hidden_size, shape.num_query_heads
    if mla := shape.mla:
        query_in = mla.q_lora_rank or hidden
        latent = hidden * mla.latent_size + (hidden * mla.q_lora_rank if mla.q_lora_rank else 0)
        query = query_in * heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        query += mla.kv_lora_rank * heads * mla.qk_nope_head_dim
        kv_head, value = 0, mla.kv_lora_rank * heads * mla.v_head_dim
        output = heads * mla.v_head_dim * hidden
    else:
        latent, value = 0, 0
        query, output = hidden * heads * shape.head_size, heads * shape.head_size * hidden
        kv_head = 2 * hidden * shape.head_size
    moe = shape.moe
    dense_layers = moe.first_dense_layers if moe else shape.num_layers
    vocabulary = shape.vocab_size * hidden
    return Weights(
        query=query,
        kv_head=kv_head,
        latent=latent,
        value=value,
        output=output,
        dense_ffn=3 * hidden * shape.intermediate_size,
        dense_layers=dense_layers,
        router=hidden * moe.routed if moe else 0,
        shared=3 * hidden * moe.intermediate_size * moe.shared if moe else 0,
        expert=3 * hidden * moe.intermediate_size if moe else 0,
        routed=moe.routed if moe else 0,
        per_token=moe.per_token if moe else 0,
        moe_layers=shape.num_layers - dense_layers,
        embedding=vocabulary,
        head=0 if shape.tie_word_embeddings else vocabulary,
    )


def parameters(shape: ModelShape) -> float:
    """Parameters of the whole model, without norms and biases."""
    weights = weights_of(shape)
    return weights.total + shape.num_layers * weights.attention(shape.num_kv_heads)
