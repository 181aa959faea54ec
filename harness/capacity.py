"""What a layout buys: KV cache tokens of a cell against its baseline, measured, beside what the layout promises."""

from harness.cell import Cell
from harness.declared import shape_of
from harness.result import Statistic
from helix_runtime.layout import resolve_layout

#: Servers round to whole blocks, so the ratio is met to a little less than exactly.
TOLERANCE = 0.02


def promised(cell: Cell, baseline_tp: int | None = None) -> float:
    """By what factor the tokens that fit grow against standard TP: GQA max(1, TP/K), MLA KVP.

    `baseline_tp`: ranks of the baseline where it has fewer, and so more KV heads on each.

    Raises LayoutError or LookupError for a layout or model that the rules do not know.
    """
    layout = resolve_layout(
        tensor_parallel_size=cell.tp,
        decode_context_parallel_size=cell.kvp,
        **shape_of(cell.model).layout_arguments(),
        helix_mode=cell.mode.helix,
        interleave_size=cell.interleave,
        allow_gqa_tpa1=True,
    )
    heads = layout.num_kv_heads
    return layout.kv_capacity_factor * max(1, heads / (baseline_tp or cell.tp)) / max(1, heads / cell.tp)


def capacity(
    cell: Cell, tokens: int | None, baseline_tokens: int | None, baseline_tp: int | None = None
) -> Statistic | None:
    """The relative miss of the promised factor.

    None for baselines, where a server reported no capacity, where blocks rather than bytes were given, and for a model
    without a shape, which is run although its layout cannot be checked.
    """
    given = "num-gpu-blocks-override" in dict(cell.serve)
    if cell.kvp == 1 or given or not tokens or not baseline_tokens:
        return None
    try:
        factor, ratio = promised(cell, baseline_tp), tokens / baseline_tokens
    except LookupError:
        return None
    return Statistic(
        name="KV capacity against the promised",
        value=abs(ratio / factor - 1),
        bound=TOLERANCE,
        n=1,
        unit="relative",
        note=f"{tokens} tokens, {ratio:.3g} times the baseline's {baseline_tokens}; the layout promises {factor:.3g}",
    )
