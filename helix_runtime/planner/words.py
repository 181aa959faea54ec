"""A plan in sentences: the verdict's paragraph, one asked layout, and where the numbers come from."""

import math

from helix_runtime.capabilities import IN_CUDA_GRAPHS
from helix_runtime.layout import legal_layouts
from helix_runtime.planner.calibration import Fit
from helix_runtime.planner.capacity import recomputed
from helix_runtime.planner.cost import TERMS
from helix_runtime.planner.hardware import BYTES
from helix_runtime.planner.plan import Plan, Question
from helix_runtime.planner.row import Row
from helix_runtime.planner.verdict import WORTHWHILE, beats


def name(row: Row) -> str:
    """`TP 64, DCP 8 (helix-gqa on FLASH_ATTN)`, with the number of servers where there are several."""
    sizes = f"TP {row.tp}" + (f", DCP {row.kvp}" if row.kvp > 1 else "")
    servers = f"{row.servers} servers of " if row.servers > 1 else ""
    return f"{servers}{sizes} ({row.mode} on {row.backend})"


def verdict(plan: Plan) -> str:
    """One paragraph: the choice, whether Helix pays and why, and what stands in its way today."""
    question, found = plan.question, plan.verdict
    if found.pays is None:
        return f"No layout can be served: {found.reason}. Try more --gpus, a shorter --context, --dtype fp8 or fp4."
    said = []
    best = found.best
    if best is not None:
        said.append(
            f"Serve {name(best)}: {best.latency_ms:.2f} ms a token ({best.latency_low_ms:.2f} to "
            f"{best.latency_high_ms:.2f}) for {best.users} users, bound by {best.bound_by}."
        )
    if found.pays:
        said.append(f"Helix pays: {_gain(plan)}; {found.reason}.")
    else:
        helix = f" Its best is {name(found.helix)}, {found.helix.latency_ms:.2f} ms." if found.helix else ""
        said.append(f"Helix does not pay here: {found.reason}.{helix}")
        if found.crossover and found.crossover > question.context:
            said.append(f"For as many users it would be faster from about {found.crossover:,} tokens on.")
        gains = found.gains
        if gains.most_users and gains.most_users >= WORTHWHILE:
            said.append(
                f"With other batches it has at most {gains.most_users:.3g} times standard TP's users, at "
                f"{gains.most_users_ms:.2f} ms."
            )
    if found.pays and found.standard and found.helix:
        said.append(_terms(found.standard, found.helix))
    if found.pays and found.stock_dcp and found.helix:
        said.append(_beside_stock(question, found.stock_dcp, found.helix))
    if best is not None and best.refused_today:
        starts = plan.starts_today
        instead = f" The best that starts today is {name(starts)}, {starts.latency_ms:.2f} ms." if starts else ""
        said.append(f"It does not start today: {best.refused_today}.{instead}")
    elif best is not None and best.helix:
        asked = ", which the plugin asks for with this backend," if best.backend not in IN_CUDA_GRAPHS else ""
        said.append(f"Times assume CUDA graphs; --enforce-eager{asked} adds about {best.eager_ms:.1f} ms.")
    return " ".join(said)


def serving(plan: Plan) -> tuple[str, ...]:
    """What the serve command takes for granted, or leaves to the reader."""
    question, shape, best = plan.question, plan.question.shape, plan.best
    if best is None:
        return ()
    said = []
    if best.servers > 1:
        said.append(f"on each of {best.servers} groups of {best.tp} GPUs")
    if question.context > shape.max_position_embeddings:
        most = shape.max_position_embeddings
        said.append(f"the model's own limit is {most:,} tokens: more needs scaled RoPE (--hf-overrides)")
    stored = shape.quantization or "bf16"
    if question.weights == "fp4" and stored in ("bf16", "fp8"):
        said.append(
            f"fp4 weights need a checkpoint that holds them (NVFP4): name it instead of {shape.name}, which is {stored}"
        )
    elif question.weights != stored and shape.quantization:
        said.append(f"this checkpoint is {stored}, and is served so whatever --dtype says of its weights")
    return tuple(said)


def cliffs(plan: Plan) -> str:
    """Granularity and capacity cliffs of the chosen layout beside standard TP, with the loss they cause."""
    best, standard = plan.verdict.best, plan.verdict.standard
    if best is None:
        return ""
    said = [
        f"{name(best)} caches in steps of {best.granularity_tokens} tokens (block x KVP): a prefix hit computes "
        f"{best.prefix_lost_tokens:g} tokens again on average"
    ]
    if standard is not None and standard.granularity_tokens != best.granularity_tokens:
        said[0] += f" (standard TP: {standard.prefix_lost_tokens:g})"
    context = plan.question.context
    said.append(f"a prefix of {context:,} tokens loses {recomputed(context, best.granularity_tokens)}")
    fit = (
        f"{best.users_that_fit} users of {context:,} tokens fit, which leaves {best.pool_wasted:.0%} of the cache empty"
    )
    if best.one_more_user_at:
        fit += f"; one more a server fits up to {best.one_more_user_at:,} tokens"
    if best.one_fewer_user_from:
        fit += f", one fewer from {best.one_fewer_user_from:,}"
    return "; ".join([*said, fit]) + "."


def about(plan: Plan, tp: int, dcp: int, helix: bool | None = None) -> str:
    """One asked layout: does capacity grow, what grows with it, and which layouts make capacity grow."""
    shape = plan.question.shape
    rows = [row for row in plan.rows if (row.tp, row.kvp) == (tp, dcp) and helix in (None, row.helix)]
    row = next((row for row in rows if row.helix), rows[0] if rows else None)
    if row is None:
        raise LookupError(f"TP {tp} with DCP {dcp}")
    plain = next((other for other in plan.rows if (other.tp, other.kvp) == (tp, 1)), None)
    what = f"TP {tp}, DCP {dcp} ({row.mode}, TPA {row.tpa})"
    if row.capacity_factor > 1.001:
        said = [f"{what}: KV capacity grows {row.capacity_factor:g} times against standard TP {tp}"]
    else:
        said = [
            f"{what}: KV capacity does not grow (factor {row.capacity_factor:g}): standard TP {tp} holds each of the "
            f"{shape.num_kv_heads} KV heads once already, and a GPU reads {max(1, shape.num_kv_heads // row.tpa)} of "
            f"them over 1/{dcp} of the sequence, the same bytes"
        ]
    if plain is not None and plain is not row:
        longer = row.latency_ms - plain.latency_ms
        said.append(
            f"What grows: attention weights read a step from {plain.terms_ms['attention weights']:.2f} to "
            f"{row.terms_ms['attention weights']:.2f} ms, exchange from 0 to {row.terms_ms['exchange']:.2f} ms, cache "
            f"steps from {plain.granularity_tokens} to {row.granularity_tokens} tokens; in all {longer:+.2f} ms a token"
        )
    if row.capacity_factor <= 1.001:
        growing = _growing(plan)
        said.append(f"Capacity grows with {growing}" if growing else "No larger layout makes capacity grow")
    return ". ".join(said) + "."


def basis(plan: Plan) -> str:
    """What was measured, what is assumed."""
    alike: dict[Fit, list[str]] = {}
    for kind, fit in plan.fits.items():
        if fit.measured:
            alike.setdefault(fit, []).append(kind)
    measured = [
        f"{' and '.join(kinds)} ({fit.n} measurements of {fit.source}, ±{math.expm1(fit.band):.0%})"
        for fit, kinds in alike.items()
    ]
    assumed = [kind for kind, fit in plan.fits.items() if not fit.measured]
    gpu = plan.question.gpu
    return (
        f"{gpu.name}: data sheet figures. Measured: {'; '.join(measured) or 'nothing'}. Assumed: "
        f"{', '.join(assumed)}. The band of a latency adds every term's own."
    )


def _gain(plan: Plan) -> str:
    gains, standard = plan.verdict.gains, plan.verdict.standard
    said = []
    if gains.latency and standard:
        said.append(
            f"{gains.latency:.2f} times lower latency than the best standard TP ({name(standard)}, "
            f"{standard.latency_ms:.2f} ms)"
        )
    if gains.users and gains.users > 1 and standard:
        said.append(f"{gains.users:.3g} times the users at {standard.latency_ms:.2f} ms")
    if gains.most_users and gains.most_users > 1:
        said.append(f"at most {gains.most_users:.3g} times the users, at {gains.most_users_ms:.2f} ms")
    return ", ".join(said) or "standard TP has no layout that fits"


def _beside_stock(question: Question, stock: Row, helix: Row) -> str:
    """What vLLM does without the plugin, which shares the cache as well where its own rules let it."""
    users = f" for {stock.users} users" if question.ttl_ms is not None else ""
    what = f"{name(stock)} with --dcp-comm-backend {stock.comm} takes {stock.latency_ms:.2f} ms{users}"
    if beats(question, stock, helix):
        return f"Stock DCP gains less: {what}."
    return f"Stock DCP shares the cache as well: {what}, without the plugin and in CUDA graphs."


def _terms(standard: Row, helix: Row) -> str:
    changed = [
        f"{term} {standard.terms_ms[term]:.2f} to {helix.terms_ms[term]:.2f}"
        for term in TERMS
        if abs(standard.terms_ms[term] - helix.terms_ms[term]) >= 0.005
    ]
    return f"By terms, standard to Helix in ms: {', '.join(changed)}."


def _growing(plan: Plan) -> str:
    """The smallest legal layouts of this model, on any number of GPUs, that hold more than standard TP."""
    question = plan.question
    shape = question.shape
    found = legal_layouts(
        gpus=4 * max(shape.num_kv_heads, 1),
        **shape.layout_arguments(),
        hardware=question.gpu.family,
        block_size=question.block,
        kv_dtype_bytes=BYTES[question.kv],
        allow_gqa_tpa1=question.allow_gqa_tpa1,
    )
    growing = [layout for layout in found if layout.kv_capacity_factor > 1.001][:3]
    return ", ".join(
        f"TP {layout.tp}, DCP {layout.kvp} ({layout.mode}, {layout.kv_capacity_factor:g} times, {layout.tp} GPUs)"
        for layout in growing
    )
