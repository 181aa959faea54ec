"""Every constraint on a layout, in the order in which it is asked: `RULES`. The only place where layouts are refused.

TP = tensor parallel size, DCP = KVP = decode context parallel size, TPA = TP / DCP, Q = query heads, K = KV heads
(MLA: one latent, K = 1). `vllm:` sources are paths in the `vllm` package, read in version 0.32.0.
"""

from collections.abc import Callable
from dataclasses import dataclass

from helix_runtime import capabilities
from helix_runtime.capabilities import HARDWARE, HELIX_GQA, HELIX_MLA, MODES, STANDARD_DCP, STANDARD_TP, Support

HELIX = (HELIX_GQA, HELIX_MLA)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A layout that somebody asks for, legal or not. Field meanings: `layout.resolve_layout`."""

    tp: int
    kvp: int
    num_query_heads: int
    num_kv_heads: int
    use_mla: bool
    helix_mode: bool
    attention_backend: str | None = None
    hardware: str | None = None
    interleave_size: int = 1
    block_size: int | None = None
    allow_gqa_tpa1: bool = False
    head_size: int | None = None
    num_layers: int | None = None
    kv_dtype_bytes: float = 2
    latent_size: int | None = None
    vllm_version: str = capabilities.DEFAULT_VLLM

    @property
    def mode(self) -> str:
        """`standard-tp`, `standard-dcp`, `helix-gqa` or `helix-mla`."""
        if self.helix_mode:
            return HELIX_MLA if self.use_mla else HELIX_GQA
        return STANDARD_DCP if self.kvp > 1 else STANDARD_TP

    @property
    def tpa(self) -> int:
        """TP / KVP: over how many shards the attention heads are spread."""
        return self.tp // self.kvp


@dataclass(frozen=True)
class Rule:
    """`broken` answers None, or the sentence that says what is broken, with its numbers."""

    name: str
    modes: tuple[str, ...]
    source: str
    broken: Callable[[Proposal], str | None]

    def check(self, proposal: Proposal) -> str | None:
        return self.broken(proposal) if proposal.mode in self.modes else None


def _sizes(p: Proposal) -> str | None:
    required = {
        "tensor_parallel_size": p.tp,
        "decode_context_parallel_size": p.kvp,
        "num_query_heads": p.num_query_heads,
        "num_kv_heads": p.num_kv_heads,
        "interleave_size": p.interleave_size,
    }
    optional = {
        "block_size": p.block_size,
        "head_size": p.head_size,
        "num_layers": p.num_layers,
        "latent_size": p.latent_size,
    }
    given = required | {name: value for name, value in optional.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return f"{name} must be an integer of at least 1, not {value!r}"
    if isinstance(p.kv_dtype_bytes, bool) or not isinstance(p.kv_dtype_bytes, int | float) or not p.kv_dtype_bytes > 0:
        return f"kv_dtype_bytes must be a number above 0, not {p.kv_dtype_bytes!r}"
    return None


def _query_group(p: Proposal) -> str | None:
    if p.num_query_heads % p.num_kv_heads and not p.use_mla:
        return f"{p.num_query_heads} query heads cannot share {p.num_kv_heads} KV heads evenly"
    return None


def _dcp_divides_tp(p: Proposal) -> str | None:
    return f"TP={p.tp} is not divisible by DCP={p.kvp}, so TPA = TP / DCP is not whole" if p.tp % p.kvp else None


def _helix_needs_dcp(p: Proposal) -> str | None:
    if p.kvp == 1:
        return f"Helix shards the KV cache by sequence and needs DCP > 1 (TP={p.tp}, DCP=1 is standard TP)"
    return None


def _mla_tpa1(p: Proposal) -> str | None:
    if p.tpa == 1:
        return None
    return (
        f"Helix for MLA needs TPA=1, so DCP = TP; TP={p.tp}, DCP={p.kvp} gives TPA={p.tpa} and would keep TP / DCP = "
        f"{p.tpa} copies of the latent cache (it is legal as standard DCP, without --helix-mode)"
    )


def _tpa_at_most_k(p: Proposal) -> str | None:
    if p.tpa <= p.num_kv_heads:
        return None
    if p.num_kv_heads == 1:
        return f"TPA={p.tpa} (TP={p.tp}, DCP={p.kvp}): a model with one KV head can only have TPA=1"
    return (
        f"TPA={p.tpa} exceeds the model's {p.num_kv_heads} KV heads (TP={p.tp}, DCP={p.kvp}): ranks would hold "
        "copies of the same KV head"
    )


def _tpa_divides_k(p: Proposal) -> str | None:
    if p.num_kv_heads % p.tpa:
        return f"{p.num_kv_heads} KV heads are not divisible by TPA={p.tpa} (TP={p.tp}, DCP={p.kvp})"
    return None


def _tpa_divides_q(p: Proposal) -> str | None:
    if p.num_query_heads % p.tpa:
        return f"{p.num_query_heads} query heads are not divisible by TPA={p.tpa} (TP={p.tp}, DCP={p.kvp})"
    return None


def _gqa_tpa1(p: Proposal) -> str | None:
    if p.tpa > 1 or p.allow_gqa_tpa1:
        return None
    only = "; a model with one KV head can only have TPA=1" if p.num_kv_heads == 1 else ""
    return (
        f"TPA=1 (TP={p.tp}, DCP={p.kvp}) for GQA is a documented limit of the original design{only}; "
        "allow_gqa_tpa1 lifts it"
    )


def _tp_divides_q(p: Proposal) -> str | None:
    if p.num_query_heads % p.tp:
        return f"{p.num_query_heads} query heads are not divisible by TP={p.tp}"
    return None


def _tp_fits_k(p: Proposal) -> str | None:
    if p.use_mla or p.num_kv_heads % p.tp == 0 or p.tp % p.num_kv_heads == 0:
        return None
    return f"TP={p.tp} and {p.num_kv_heads} KV heads: one must divide the other"


def _tp_above_k(p: Proposal) -> str | None:
    if p.use_mla or p.tp > p.num_kv_heads:
        return None
    return (
        f"standard DCP on GQA needs TP > K: TP={p.tp} leaves no copy of the {p.num_kv_heads} KV heads to save "
        "(Helix has no such limit)"
    )


def _dcp_at_most_copies(p: Proposal) -> str | None:
    copies = p.tp // p.num_kv_heads
    if p.use_mla or p.kvp <= copies:
        return None
    return f"standard DCP on GQA needs DCP <= TP / K: DCP={p.kvp} exceeds {p.tp} / {p.num_kv_heads} = {copies}"


def _dcp_divides_group(p: Proposal) -> str | None:
    group = p.num_query_heads // p.num_kv_heads
    if p.use_mla or group % p.kvp == 0:
        return None
    return f"standard DCP on GQA needs (Q / K) % DCP = 0: {group} query heads per KV head, DCP={p.kvp}"


def _dcp_divides_copies(p: Proposal) -> str | None:
    copies = p.tp // p.num_kv_heads
    if p.use_mla or copies % p.kvp == 0:
        return None
    return (
        f"DCP={p.kvp} does not divide the TP / K = {copies} copies of a KV head (TP={p.tp}, K={p.num_kv_heads}): "
        "a DCP group would hold two different KV heads; vLLM does not check this"
    )


def _interleave(p: Proposal) -> str | None:
    if p.kvp > 1 and p.block_size is not None and p.block_size % p.interleave_size:
        return f"the interleave size {p.interleave_size} does not divide the block size {p.block_size}"
    return None


def _known_names(p: Proposal) -> str | None:
    try:
        names = capabilities.backends(vllm_version=p.vllm_version)
        if p.hardware is not None:
            capabilities.backends(p.hardware, vllm_version=p.vllm_version)
    except ValueError as unknown:
        return str(unknown)
    if p.attention_backend is not None and p.attention_backend not in names:
        return f"unknown attention backend {p.attention_backend!r}; valid: {', '.join(names)}"
    return None


def _capability(p: Proposal) -> str | None:
    """With a backend: its rows must not all say unsupported. With hardware alone: some backend must do the mode."""
    if p.attention_backend is None:
        if p.hardware is None:
            return None
        default = capabilities.default_backend(p.hardware, p.mode, p.vllm_version, use_mla=p.use_mla)
        return None if default else _nothing_on(p)
    if capabilities.is_mla(p.attention_backend, p.vllm_version) != p.use_mla:
        serves, model = ("MLA", "GQA") if not p.use_mla else ("GQA", "MLA")
        return f"{p.attention_backend} serves {serves} models and this is a model with {model}"
    families = (p.hardware,) if p.hardware else tuple(HARDWARE)
    rows = {family: capabilities.declare(p.attention_backend, family, p.mode, p.vllm_version) for family in families}
    if any(row.support is not Support.UNSUPPORTED for row in rows.values()):
        return None
    # Without hardware, quote a family on which the backend runs at all: there the reason is about the mode.
    runs_on = capabilities.families_of(p.attention_backend, p.vllm_version)
    family = next((family for family in rows if family in runs_on), families[0])
    where = f" on {p.hardware}" if p.hardware else ""
    return (
        f"{p.attention_backend}{where} does not support {p.mode} with vLLM {p.vllm_version}: {rows[family].reason} "
        f"[{rows[family].source}]"
    )


def _nothing_on(p: Proposal) -> str:
    """No backend does this mode on this hardware: quote each that serves this kind of model there."""
    quotes = [
        f"{name}: {row.reason} [{row.source}]"
        for name in capabilities.backends(mla=p.use_mla, vllm_version=p.vllm_version)
        if p.hardware in capabilities.families_of(name, p.vllm_version)
        for row in [capabilities.declare(name, p.hardware, p.mode, p.vllm_version)]
    ]
    return f"no backend supports {p.mode} on {p.hardware} with vLLM {p.vllm_version}: " + "; ".join(quotes)


_VLLM = "vllm: config/model.py verify_with_parallel_config"
_DESIGN = "Helix design (arXiv 2507.07120, section 2)"

#: All rules. The first broken one is the refusal.
RULES: tuple[Rule, ...] = (
    Rule("positive-sizes", MODES, "this module", _sizes),
    Rule("known-names", MODES, "helix_runtime/capabilities.py", _known_names),
    Rule("query-heads-divisible-by-kv-heads", MODES, "grouped-query attention", _query_group),
    Rule("tp-divisible-by-dcp", MODES, "vllm: config/parallel.py", _dcp_divides_tp),
    Rule("helix-needs-dcp", HELIX, _DESIGN, _helix_needs_dcp),
    Rule("helix-mla-needs-tpa-1", (HELIX_MLA,), _DESIGN, _mla_tpa1),
    Rule("tpa-at-most-kv-heads", (HELIX_GQA,), _DESIGN, _tpa_at_most_k),
    Rule("query-heads-divisible-by-tpa", (HELIX_GQA,), _DESIGN, _tpa_divides_q),
    Rule("kv-heads-divisible-by-tpa", (HELIX_GQA,), _DESIGN, _tpa_divides_k),
    Rule("query-heads-divisible-by-tp", MODES, _VLLM, _tp_divides_q),
    Rule("gqa-tpa-1", (HELIX_GQA,), "the original Helix design's documented limits", _gqa_tpa1),
    Rule("tp-above-kv-heads", (STANDARD_DCP,), _VLLM, _tp_above_k),
    Rule("dcp-at-most-kv-copies", (STANDARD_DCP,), _VLLM, _dcp_at_most_copies),
    Rule("query-group-divisible-by-dcp", (STANDARD_DCP,), _VLLM, _dcp_divides_group),
    Rule("tp-fits-kv-heads", (STANDARD_TP, STANDARD_DCP), "vllm: QKVParallelLinear", _tp_fits_k),
    Rule("kv-copies-divisible-by-dcp", (STANDARD_DCP,), "this project: rank order of DCP groups", _dcp_divides_copies),
    Rule("interleave-divides-block", MODES, "vllm: config/vllm.py", _interleave),
    Rule("capability", MODES, "helix_runtime/capabilities.py", _capability),
)


def first_broken(proposal: Proposal) -> tuple[Rule, str] | None:
    """The first rule that a proposal breaks, with its sentence; None for a legal one."""
    for rule in RULES:
        if sentence := (rule.broken(proposal) if rule is RULES[0] else rule.check(proposal)):
            return rule, sentence
    return None
