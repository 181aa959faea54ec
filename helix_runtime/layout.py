"""TP, DCP and a model's heads -> a layout: who computes, owns and caches what; or a refusal that quotes its rule.

Ranks of a sequence group are consecutive: `tpa = rank // KVP`, `kvp = rank % KVP`. So after the exchange rank r owns
query heads `[r * Q / TP, (r + 1) * Q / TP)`, which is the ordinary `o_proj` shard. No torch and no vLLM here.
The rules themselves, each with its sentence, are `layout_rules.RULES`.
"""

import math
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace

from helix_runtime import capabilities
from helix_runtime.layout_ranks import Layout
from helix_runtime.layout_rules import RULES, Proposal, Rule, first_broken

__all__ = ["RULES", "Layout", "LayoutError", "Proposal", "Rule", "legal_layouts", "resolve_layout"]

#: Rules about the model or an option, which no TP and DCP can mend.
_NOT_ABOUT_SIZES = ("positive-sizes", "known-names", "query-heads-divisible-by-kv-heads")

#: How many layouts a refusal names.
NEAREST = 3


class LayoutError(ValueError):
    """A refused layout.

    `rule`: its name in `RULES`; `source`: where the rule is from; `sentence`: what is broken, with its numbers;
    `legal`: the nearest legal layouts, which the text gives as flags.
    """

    def __init__(self, rule: Rule, sentence: str, legal: tuple[Layout, ...] = ()):
        self.rule = rule.name
        self.source = rule.source
        self.sentence = sentence
        self.legal = legal
        shown = ", ".join(f"{shlex.join(layout.to_args())} (TPA={layout.tpa})" for layout in legal)
        hint = f"legal here: {shown}" if legal else "no layout of this model is legal with these options"
        super().__init__(f"{sentence}; {hint} [rule {self.rule}, {self.source}]")


def resolve_layout(
    tensor_parallel_size: int,
    decode_context_parallel_size: int,
    num_query_heads: int,
    num_kv_heads: int | None,
    use_mla: bool,
    helix_mode: bool,
    attention_backend: str | None = None,
    hardware: str | None = None,
    *,
    interleave_size: int = 1,
    block_size: int | None = None,
    allow_gqa_tpa1: bool = False,
    head_size: int | None = None,
    num_layers: int | None = None,
    kv_dtype_bytes: float = 2,
    latent_size: int | None = None,
    vllm_version: str | None = None,
) -> Layout:
    """The layout that these options mean, or LayoutError with the broken rule and the nearest legal layouts.

    `num_kv_heads` is ignored for MLA, which caches one latent of `latent_size` values (default 576). `hardware` is a
    family of `capabilities.HARDWARE`. `block_size`, `interleave_size`: tokens. `head_size`, `num_layers`,
    `kv_dtype_bytes` (0.5 for FP4) only serve the byte counts.
    """
    proposal = _propose(
        tensor_parallel_size,
        decode_context_parallel_size,
        num_query_heads,
        num_kv_heads,
        use_mla,
        helix_mode,
        attention_backend=attention_backend,
        hardware=hardware,
        interleave_size=interleave_size,
        block_size=block_size,
        allow_gqa_tpa1=allow_gqa_tpa1,
        head_size=head_size,
        num_layers=num_layers,
        kv_dtype_bytes=kv_dtype_bytes,
        latent_size=latent_size,
        vllm_version=vllm_version,
    )
    if broken := first_broken(proposal):
        rule, sentence = broken
        raise LayoutError(rule, sentence, _nearest(proposal))
    return _layout(proposal)


def legal_layouts(
    num_query_heads: int,
    num_kv_heads: int | None,
    use_mla: bool,
    gpus: int,
    *,
    helix_mode: bool | None = None,
    **options: object,
) -> list[Layout]:
    """Every legal layout of a model with TP <= `gpus`, by TP, DCP, standard before Helix.

    `helix_mode`: only Helix, only standard, or both (None). `options`: further keywords of `resolve_layout`.
    LayoutError where the model or an option is wrong, whatever TP and DCP.
    """
    found = []
    # No TP above the query heads is legal (rule query-heads-divisible-by-tp); one is asked to hear of a wrong model.
    for tp in range(1, min(gpus, _size(num_query_heads)) + 1):
        for kvp in _divisors(tp):
            for helix in (False, True) if helix_mode is None else (helix_mode,):
                proposal = _propose(tp, kvp, num_query_heads, num_kv_heads, use_mla, helix, **options)
                broken = first_broken(proposal)
                if broken is None:
                    found.append(_layout(proposal))
                elif broken[0].name in _NOT_ABOUT_SIZES:
                    raise LayoutError(*broken)
    return found


def _propose(
    tp: int,
    kvp: int,
    num_query_heads: int,
    num_kv_heads: int | None,
    use_mla: bool,
    helix_mode: bool,
    *,
    vllm_version: str | None = None,
    **options: object,
) -> Proposal:
    """A proposal with the version's default filled in and, for MLA, the one latent head as K."""
    return Proposal(
        tp=tp,
        kvp=kvp,
        num_query_heads=num_query_heads,
        num_kv_heads=1 if use_mla else num_kv_heads,
        use_mla=use_mla,
        helix_mode=helix_mode,
        vllm_version=vllm_version or capabilities.DEFAULT_VLLM,
        **options,
    )


def _nearest(asked: Proposal) -> tuple[Layout, ...]:
    """Legal layouts close to a refused one: other sizes first, then as few other options as it takes.

    If the same sizes are legal with Helix switched the other way, that layout is named too, last.
    """
    found: tuple[Layout, ...] = ()
    for variant in _variants(asked):
        if found := _nearest_sizes(variant):
            break
    twin = replace(asked, helix_mode=not asked.helix_mode)
    if found and twin.mode != found[0].mode and not first_broken(twin):
        found += (_layout(twin),)
    return found


def _nearest_sizes(asked: Proposal) -> tuple[Layout, ...]:
    """The legal layouts of the asked mode, as it is but for TP and DCP: same TP first, then nearest by ratio."""
    if first_broken(replace(asked, tp=1, kvp=1, helix_mode=False, attention_backend=None, hardware=None)):
        return ()  # not about TP and DCP: the model or an option is wrong
    tp, kvp = _size(asked.tp), _size(asked.kvp)
    mode = asked.mode if kvp == asked.kvp else None
    candidates = [
        candidate
        for near_tp in _divisors(asked.num_query_heads)
        for near_kvp in _divisors(near_tp)
        for candidate in [replace(asked, tp=near_tp, kvp=near_kvp)]
        if mode in (None, candidate.mode) and not first_broken(candidate)
    ]

    def distance(near: Proposal) -> tuple:
        return near.tp != tp, abs(math.log2(near.tp / tp)), abs(math.log2(near.kvp / kvp)), near.tp, near.kvp

    return tuple(_layout(candidate) for candidate in sorted(candidates, key=distance)[:NEAREST])


def _variants(asked: Proposal) -> Iterator[Proposal]:
    """What was asked, then with more and more of its other options changed to ones that work."""
    yield asked
    if asked.block_size and _size(asked.block_size) == asked.block_size:
        interleave = max(size for size in _divisors(asked.block_size) if size <= _size(asked.interleave_size))
        asked = replace(asked, interleave_size=interleave)
        yield asked
    yield replace(asked, allow_gqa_tpa1=True)
    try:
        others = capabilities.backends(asked.hardware, mla=asked.use_mla, vllm_version=asked.vllm_version)
    except ValueError:
        return  # the hardware or the version is unknown: nothing to offer
    if asked.attention_backend is not None:
        for backend in others:
            yield replace(asked, attention_backend=backend)
            yield replace(asked, attention_backend=backend, allow_gqa_tpa1=True)
    yield replace(asked, helix_mode=False)
    yield replace(asked, helix_mode=False, kvp=1)
    for backend in others:
        yield replace(asked, helix_mode=False, kvp=1, attention_backend=backend)


def _layout(proposal: Proposal) -> Layout:
    return Layout(**{field.name: getattr(proposal, field.name) for field in fields(Proposal)})


def _size(value: object) -> int:
    """`value` where it is a legal size, else 1: a start for the search when what was asked makes no sense."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else 1


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
