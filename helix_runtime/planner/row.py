"""One layout in a plan: what it holds, how fast it should be, what bounds it, how to serve it."""

import shlex
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from helix_runtime import capabilities
from helix_runtime.layout import Layout

if TYPE_CHECKING:
    from helix_runtime.planner.plan import Question


class Row(BaseModel):
    """A legal layout with one backend. Bytes are of one GPU; users and tokens are over all GPUs; times of one step.

    `batch` is of one server, of which there are `servers`. `possible`: the batch fits, and keeps the latency where
    one is asked. `latency_low_ms`, `latency_high_ms`: the error band. `reads_ms`: attention without its
    kernels' overhead, which is all that more sharding can save. `eager_ms`: what launching without CUDA graphs
    would add. `comm`: the exchange, as `--dcp-comm-backend` takes it; None for standard TP. `refused_today`: why the
    plugin or vLLM does not start this layout yet, or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tp: int
    kvp: int
    tpa: int
    mode: str
    backend: str
    comm: str | None = None
    servers: int
    duplication: int
    capacity_factor: float
    kv_bytes_per_token_gpu: float
    kv_bytes_per_user_gpu: float
    kv_pool_bytes_gpu: float
    weight_bytes_gpu: float
    users_that_fit: int
    tokens_that_fit: int
    pool_wasted: float
    block_rounding: float
    granularity_tokens: int
    prefix_lost_tokens: float
    one_more_user_at: int | None
    one_fewer_user_from: int | None
    batch: int = 1
    users: int = 1
    possible: bool = False
    latency_ms: float = 0.0
    latency_low_ms: float = 0.0
    latency_high_ms: float = 0.0
    terms_ms: dict[str, float]
    reads_ms: float
    bound_by: str
    eager_ms: float
    prefill_s: float = 0.0
    prefill_factor: float | None = None
    tokens_per_second_user: float = 0.0
    tokens_per_second_gpu: float = 0.0
    pareto: bool = False
    refused_today: str | None
    notes: tuple[str, ...]
    command: str

    @property
    def helix(self) -> bool:
        return self.mode in (capabilities.HELIX_GQA, capabilities.HELIX_MLA)


def bound(terms: dict[str, float], attention_computes: bool, weights_compute: bool) -> str:
    """The largest term in words: reads of KV or weights, arithmetic, links, or launches."""
    grouped = {
        "attention arithmetic" if attention_computes else "KV reads": terms["attention"],
        "FFN arithmetic" if weights_compute else "weight reads": terms["attention weights"] + terms["FFN weights"],
        "collectives": terms["gather"] + terms["exchange"] + terms["all-reduce"],
        "kernel launches": terms["launch"],
    }
    return max(grouped, key=grouped.get)


def refused(layout: Layout, question: "Question") -> str | None:
    """Why `layout` does not start today although its rules allow it."""
    if not layout.helix_mode:
        return None
    if question.weights != "bf16":
        return f"the plugin has not proved Helix with {question.weights} weights"
    if question.kv != "bf16":
        return f"the plugin has not proved Helix with an {question.kv} KV cache"
    return capabilities.plugin_refusal_on_cuda(layout.attention_backend, layout.use_mla, eager=True)


_KV_FLAG = {"fp8": "fp8", "fp4": "nvfp4"}


def command(layout: Layout, question: "Question", q_replicate: bool, comm: str | None) -> str:
    """What a user types to serve `layout` on one server's GPUs."""
    args = ["vllm", "serve", question.shape.name, *layout.to_args(), "--max-model-len", str(question.context)]
    if question.weights == "fp8" and question.shape.quantization is None:
        args += ["--quantization", "fp8"]  # vLLM quantises 16-bit weights as it loads them
    if question.kv in _KV_FLAG:
        args += ["--kv-cache-dtype", _KV_FLAG[question.kv]]
    if question.block != 16:
        args += ["--block-size", str(question.block)]
    if comm == "a2a" and not layout.helix_mode:  # Helix asks for it by itself
        args += ["--dcp-comm-backend", comm]
    if q_replicate:
        args += ["--dcp-q-replicate"]
    if layout.helix_mode and layout.attention_backend not in capabilities.IN_CUDA_GRAPHS:
        args += ["--enforce-eager"]
    return shlex.join(args)
