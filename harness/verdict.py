"""What a cell's run can mean, and what each meaning does to the exit status. The one table of verdicts."""

from enum import StrEnum
from functools import cache
from typing import NamedTuple


class Effect(StrEnum):
    """A verdict's part in the exit status of a run."""

    OK = "ok"  # as declared: exit 0
    DIFFERS = "differs"  # a statement about Helix that differs from the declared one: exit 1
    INFRASTRUCTURE = "infrastructure"  # says nothing about Helix: exit 3
    NEUTRAL = "neutral"  # nothing was run: no part in the exit status


class Verdict(StrEnum):
    """The outcome of one cell. Words as in the report and in every machine-readable output."""

    PASS = "pass"
    FAIL = "fail"
    XFAIL = "xfail"
    XPASS = "xpass"
    REJECTED = "rejected"
    UNPROVEN = "unproven"
    ERROR = "error"
    SKIP = "skip"
    FLAKY = "flaky"
    STALE = "stale"


class Meaning(NamedTuple):
    effect: Effect
    symbol: str  # a shape, so that colour is never the only sign
    sentence: str


TABLE: dict[Verdict, Meaning] = {
    Verdict.PASS: Meaning(
        Effect.OK, "✓", "agrees with its baseline and its path was seen to run; a baseline answered all"
    ),
    Verdict.FAIL: Meaning(
        Effect.DIFFERS,
        "✗",
        "answers differ from standard TP, KV capacity from what the layout promises, or no declared refusal came; the "
        "self-test of the exchange failed at start; or the server died or hung while answering, twice, where its "
        "baseline answered all",
    ),
    Verdict.XFAIL: Meaning(Effect.OK, "⊘", "known limitation, seen again"),
    Verdict.XPASS: Meaning(Effect.DIFFERS, "!", "known limitation is gone: update the declared table"),
    Verdict.REJECTED: Meaning(Effect.OK, "⊟", "refused at start-up with the documented rule"),
    Verdict.UNPROVEN: Meaning(Effect.DIFFERS, "?", "answers agree, but nothing proves that the claimed path ran"),
    Verdict.ERROR: Meaning(Effect.INFRASTRUCTURE, "⚠", "infrastructure failed; says nothing about Helix"),
    Verdict.SKIP: Meaning(Effect.NEUTRAL, "–", "this host cannot run it; the reason is given"),
    Verdict.FLAKY: Meaning(
        Effect.DIFFERS, "≈", "attempts disagree, or two starts of one cell differ by more than right servers do"
    ),
    Verdict.STALE: Meaning(Effect.NEUTRAL, "∅", "recorded for other code or versions; run again"),
}

#: How a deliberate defect may be caught: its answers differ, or nothing proves the path that it left.
CAUGHT = (Verdict.FAIL, Verdict.UNPROVEN)

#: Verdicts that a suite or a rule may declare for a cell; `fail` is declared for deliberate defects only.
DECLARABLE = (Verdict.PASS, Verdict.XFAIL, Verdict.REJECTED, Verdict.SKIP)


@cache
def effect_of(declared: Verdict, observed: Verdict) -> Effect:
    """The part of one cell in the exit status.

    A refusal that nobody declared differs, although `rejected` is fine where it was declared. `fail` is declared for
    deliberate defects only: they are as declared when the oracle catches them, by the answers or by the proof of path.
    """
    if declared is Verdict.FAIL and observed in (*CAUGHT, Verdict.PASS):
        return Effect.DIFFERS if observed is Verdict.PASS else Effect.OK
    if observed is Verdict.REJECTED and declared is not Verdict.REJECTED:
        return Effect.DIFFERS
    return TABLE[observed].effect


def exit_status(pairs: list[tuple[Verdict, Verdict]]) -> int:
    """Exit status of a run from (declared, observed) pairs: 1 wins over 3, 3 over 0."""
    effects = {effect_of(declared, observed) for declared, observed in pairs}
    if Effect.DIFFERS in effects:
        return 1
    return 3 if Effect.INFRASTRUCTURE in effects else 0
