"""Whether Helix pays: the best Helix layout against the best standard TP and stock DCP, and the reason in words."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from helix_runtime.capabilities import STANDARD_DCP, STANDARD_TP
from helix_runtime.planner.row import Row

if TYPE_CHECKING:
    from helix_runtime.planner.candidates import Sweep
    from helix_runtime.planner.plan import Question

#: A gain below this is no reason to leave standard TP: fits miss single terms by more.
WORTHWHILE = 1.1
#: Layouts that are closer than this are as good as each other. So are those that a single user parts.
ALIKE = 1.05


class Gains(BaseModel):
    """Helix over standard TP. `latency`: at the asked users. `users`: at the latency of the best standard layout.

    `interactivity`: of the lowest latencies, each at its own batch. `most_users`: the largest ratio at any latency
    that both can keep, and `most_users_ms`, that latency. None where one of the two has no layout that fits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latency: float | None
    users: float | None
    interactivity: float | None
    most_users: float | None
    most_users_ms: float | None


class Verdict(BaseModel):
    """`pays`: Helix is chosen; None where there is nothing to compare. `standard`, `helix`, `stock_dcp`: the best of
    each kind. `crossover`: context from which Helix is faster than standard TP, if any is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pays: bool | None
    reason: str
    best: Row | None
    standard: Row | None
    helix: Row | None
    stock_dcp: Row | None
    gains: Gains
    crossover: int | None


def judge(question: "Question", rows: Sequence[Row], sweep: "Sweep", crossover: Callable[[], int | None]) -> Verdict:
    """`rows`: the best first. `crossover` is asked only where both kinds of layout exist."""
    possible = [row for row in rows if row.possible]
    standard = next((row for row in possible if row.mode == STANDARD_TP), None)
    helix = next((row for row in possible if row.helix), None)
    gains = _gains(sweep, standard, helix, question.ttl_ms is None)
    stock = next((row for row in possible if row.mode == STANDARD_DCP), None)
    pays, reason = _reason(question, rows, standard, helix, stock)
    return Verdict(
        pays=pays,
        reason=reason,
        best=helix if pays else _instead(question, standard, stock) or helix,
        standard=standard,
        helix=helix,
        stock_dcp=stock,
        gains=gains,
        crossover=crossover() if any(row.helix for row in rows) else None,
    )


def gain(question: "Question", one: Row, other: Row) -> float:
    """By what factor `other` is better than `one` at what was asked: latency, or users at a latency."""
    if question.ttl_ms is not None:
        return other.users / one.users
    return one.latency_ms / other.latency_ms


def beats(question: "Question", one: Row, other: Row) -> bool:
    """Whether `other` is better than `one` by more than what makes them alike."""
    if question.ttl_ms is not None and other.users - one.users <= 1:
        return False
    return gain(question, one, other) > ALIKE


def _instead(question: "Question", standard: Row | None, stock: Row | None) -> Row | None:
    """What is served without Helix. What is not worthwhile is not chosen: it only adds parts that can break."""
    if standard is None or stock is None:
        return standard or stock
    return stock if gain(question, standard, stock) >= WORTHWHILE else standard


def _gains(sweep: "Sweep", standard: Row | None, helix: Row | None, fixed_users: bool) -> Gains:
    plain = np.array([layout.mode == STANDARD_TP for layout in sweep.layouts])
    ours = np.array([layout.helix_mode for layout in sweep.layouts])
    latency = standard.latency_ms / helix.latency_ms if standard and helix and fixed_users else None
    empty = Gains(latency=latency, users=None, interactivity=None, most_users=None, most_users_ms=None)
    if not np.isfinite(sweep.seconds[plain]).any() or not np.isfinite(sweep.seconds[ours]).any():
        return empty
    fastest = sweep.seconds[plain].min()
    latencies = np.unique(sweep.seconds[plain][np.isfinite(sweep.seconds[plain])])

    def most(which: np.ndarray, seconds: float) -> float:
        return float(np.where(sweep.seconds[which] <= seconds, sweep.users[which], 0).max())

    ratios = [most(ours, seconds) / most(plain, seconds) for seconds in latencies]
    at = int(np.argmax(ratios))
    users = None
    if standard is not None and (theirs := most(plain, standard.latency_ms * 1e-3 * 1.000001)):
        users = most(ours, standard.latency_ms * 1e-3 * 1.000001) / theirs
    return Gains(
        latency=latency,
        users=users,
        interactivity=float(fastest / sweep.seconds[ours].min()),
        most_users=ratios[at],
        most_users_ms=float(latencies[at] * 1e3),
    )


def _reason(
    question: "Question", rows: Sequence[Row], standard: Row | None, helix: Row | None, stock: Row | None
) -> tuple[bool | None, str]:
    if not any(row.possible for row in rows):
        need = min(row.weight_bytes_gpu for row in rows) / 1e9
        if question.ttl_ms is not None and any(row.users_that_fit for row in rows):
            fastest = min(row.latency_ms for row in rows if row.users_that_fit)
            return None, f"no layout keeps {question.ttl_ms:g} ms a token; the fastest that fits takes {fastest:.2f} ms"
        most = max(row.users_that_fit for row in rows)
        return None, (
            f"nothing fits: at most {most} of {question.users} users of {question.context:,} tokens, and the weights "
            f"take at least {need:.0f} GB of each GPU's {question.gpu.memory / 1e9:.0f}"
        )
    if helix is None:
        legal = any(row.helix for row in rows)
        return False, "no Helix layout fits" if legal else "no Helix layout is legal here"
    if stock is not None and beats(question, helix, stock) and _instead(question, standard, stock) is stock:
        return False, _stock_better(question, standard, helix, stock)
    if standard is None:
        return True, "only with a shared KV cache do that many users fit at all"
    factor = gain(question, standard, helix)
    if factor >= WORTHWHILE:
        return True, _why(question, standard, helix)
    why = _why_not(question, standard, helix)
    if factor > 1:
        why = f"{factor:.2f} times is less than the {WORTHWHILE:g} from which a modelled gain counts; {why}"
    return False, why


def _stock_better(question: "Question", standard: Row | None, helix: Row, stock: Row) -> str:
    """Some sharing pays, and more of it would not: stock DCP also has sizes between none and all."""
    if question.ttl_ms is not None:
        found, ours, theirs = f"{stock.users} users", f"{helix.users}", standard and f"{standard.users}"
    else:
        found, ours, theirs = (row and f"{row.latency_ms:.2f} ms" for row in (stock, helix, standard))
    said = f"sharing the KV cache pays, and stock DCP does it better: {found} with TP {stock.tp}, DCP {stock.kvp}"
    said = f"{said}, {ours} with Helix's best, {theirs or 'no layout that fits'} with standard TP's"
    if standard is None or gain(question, standard, helix) >= WORTHWHILE:
        return said
    return f"{said}; {_why_not(question, standard, helix)}"


def _why(question: "Question", standard: Row, helix: Row) -> str:
    saved = standard.terms_ms["attention"] - helix.terms_ms["attention"]
    if question.ttl_ms is not None and helix.kv_bytes_per_user_gpu < standard.kv_bytes_per_user_gpu:
        return "each GPU holds and reads less of every user's cache, so more users keep the latency"
    others = sum(standard.terms_ms[term] - helix.terms_ms[term] for term in standard.terms_ms if term != "attention")
    return f"attention takes {_less(saved)}, everything else {_less(others)}"


def _less(saved: float) -> str:
    return f"{abs(saved):.2f} ms {'less' if saved >= 0 else 'more'}"


def _why_not(question: "Question", standard: Row, helix: Row) -> str:
    """The first of these that explains it."""
    total, saved = standard.latency_ms, standard.terms_ms["attention"] - helix.terms_ms["attention"]
    collectives = sum(helix.terms_ms[term] - standard.terms_ms[term] for term in ("gather", "exchange", "all-reduce"))
    weights = sum(helix.terms_ms[term] - standard.terms_ms[term] for term in ("attention weights", "FFN weights"))
    price = f"the exchange adds {collectives:.2f} ms and weights {weights:+.2f} ms, and attention saves {saved:.2f} ms"
    if standard.reads_ms < 0.15 * total:
        return f"short context: reading KV is {standard.reads_ms / total:.0%} of a step; {price}"
    if helix.bound_by.endswith("arithmetic"):
        return f"bound by {helix.bound_by}, which sharding the sequence does not lessen; {price}"
    if helix.kvp > 1 and helix.tp > question.gpu.domain:
        return f"slow links: TP {helix.tp} leaves the NVLink domain of {question.gpu.domain} GPUs; {price}"
    if helix.capacity_factor <= 1.001:
        return f"standard TP already holds each KV head once, so no GPU reads less; {price}"
    return price
