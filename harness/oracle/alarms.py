"""How often does the oracle alarm on right servers? `python -m harness alarms FOLDER … [--json FILE]`.

FOLDERs hold saved transcripts of right servers (`python -m harness starts`). Every two are compared that hold the same
tokens of the same model, dtype and prompts. Each comparison is judged at several stated rates, by a band measured from
standard TP on the same prompts: from the first and a third, or, where neither is standard TP, from two others.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.frozen import Frozen
from harness.oracle.band import measured_with
from harness.oracle.clean import Clean, clean_comparisons
from harness.oracle.measure import Rates, beyond, measure
from harness.oracle.saved import Saved, find
from harness.oracle.statistics import exact_interval, upper_share

#: Rates a comparison is judged at: alone at 10, 1 and 0.1 %, and as one of 50 cells of a run at 1 %.
RATES = (0.1, 0.01, 0.001, 0.01 / 50)
LISTED = 0.01


class Rate(Frozen):
    """Alarms of `n` comparisons at one stated rate a comparison; `low`, `high`: exact 95 % interval of their share.

    `upper`: one-sided exact 95 % upper bound of the share.
    """

    stated: float
    alarms: int
    n: int
    low: float
    high: float
    upper: float


class Group(Frozen):
    """The comparisons of one kind: alarms at each of the rates of `RATES`."""

    name: str
    n: int
    alarms: tuple[int, ...]


class Alarm(Frozen):
    """One alarm: what was compared, the least stated rate at which it came, and the statistics beyond their bounds."""

    baseline: str
    candidate: str
    workload: str
    rate: float
    beyond: tuple[str, ...]


class Table(Frozen):
    """`rates`: of all comparisons. `as_run`: of those that a run makes, of a server that follows with the baseline that
    chose freely; `starts`: servers among the latter, baselines included. `held_out`: of `as_run`, those of models that
    no shipped band was measured with, so that nothing that judges them has seen them. `identical` comparisons had no
    change in any step; they are not counted in any `n`.
    """

    transcripts: int
    steps: int
    identical: int
    rates: tuple[Rate, ...]
    starts: int
    as_run: tuple[Rate, ...]
    held_out: tuple[Rate, ...]
    groups: tuple[Group, ...]
    alarms: tuple[Alarm, ...]


class Judged(NamedTuple):
    """A clean comparison and the statistics beyond their bounds, for each of `RATES`."""

    pair: Clean
    alarms: tuple[tuple[str, ...], ...]


def judged(pair: Clean) -> Judged:
    return Judged(
        pair, tuple(tuple(i.name for i in beyond(measure(pair.found, pair.band, Rates(rate)))) for rate in RATES)
    )


def table(saved: Sequence[Saved]) -> Table:
    counted: list[Judged] = []
    identical = 0
    for pair in clean_comparisons(saved):
        if pair.identical:
            identical += 1
        else:
            counted.append(judged(pair))
    groups: dict[str, list[Judged]] = defaultdict(list)
    for item in counted:
        first, second = item.pair.first, item.pair.second
        groups[f"{second.transcript.dtype}, {second.model}, {first.mode} : {second.mode}"].append(item)
    as_run = [item for item in counted if not item.pair.first.forced]
    fresh = [item for item in as_run if not measured_with(item.pair.first.transcript.dtype, _recipe(item.pair.first))]
    servers = {saved.path.parent for item in as_run for saved in (item.pair.first, item.pair.second)}
    return Table(
        transcripts=len(saved), steps=sum(len(item.pair.found.steps) for item in counted), identical=identical,
        rates=_rates(counted), starts=len(servers), as_run=_rates(as_run),
        held_out=_rates(fresh),
        groups=tuple(
            Group(
                name=name, n=len(items),
                alarms=tuple(sum(bool(item.alarms[index]) for item in items) for index in range(len(RATES))),
            )
            for name, items in sorted(groups.items())
        ),
        alarms=tuple(_alarm(item) for item in counted if any(item.alarms)),
    )  # fmt: skip


def _recipe(saved: Saved) -> str:
    return f"recipe:{saved.model}"


def _rates(some: Sequence[Judged]) -> tuple[Rate, ...]:
    n, rates = len(some), []
    for index, rate in enumerate(RATES):
        hits = sum(bool(item.alarms[index]) for item in some)
        low, high = exact_interval(hits, n) if n else (0.0, 1.0)
        upper = upper_share(hits, n) if n else 1.0
        rates.append(Rate(stated=rate, alarms=hits, n=n, low=low, high=high, upper=upper))
    return tuple(rates)


def _alarm(item: Judged) -> Alarm:
    rate, names = min((rate, names) for rate, names in zip(RATES, item.alarms, strict=True) if names)
    return Alarm(
        baseline=item.pair.first.transcript.cell_id, candidate=item.pair.second.transcript.cell_id,
        workload=item.pair.first.transcript.workload_key, rate=rate, beyond=names,
    )  # fmt: skip


def _shares(rates: Sequence[Rate]) -> list[str]:
    return [
        "",
        "| stated rate of a comparison | alarms | share, exact 95 % interval | one-sided 95 % upper bound |",
        "| --- | --- | --- | --- |",
        *(
            f"| {rate.stated:.2%} | {rate.alarms} of {rate.n} | {rate.alarms / max(1, rate.n):.2%} "
            f"({rate.low:.2%} – {rate.high:.2%}) | {rate.upper:.2%} |"
            for rate in rates
        ),
    ]


def told(made: Table) -> str:
    """The table as Markdown."""
    lines = [
        f"{made.rates[0].n} comparisons of {made.transcripts} transcripts, {made.steps:,} steps; "
        f"{made.identical} more were identical in every step and are not counted.",
        *_shares(made.rates),
        "",
        f"Of these, {made.as_run[0].n} are what a run compares: {made.starts} server starts, each with its baseline.",
        *_shares(made.as_run),
        "",
        f"Of these, {made.held_out[0].n} are of models that no shipped band was measured with: out of sample.",
        *_shares(made.held_out),
    ]
    stated = " | ".join(f"at {rate:.2%}" for rate in RATES)
    lines += ["", f"| dtype, model, modes | comparisons | {stated} |", "| --- " * (len(RATES) + 2) + "|"]
    lines += [f"| {group.name} | {group.n} | {' | '.join(map(str, group.alarms))} |" for group in made.groups]
    rare = [alarm for alarm in made.alarms if alarm.rate <= LISTED]
    if rare:
        lines += ["", f"Alarms at {LISTED:.0%} and below:", ""]
    lines += [
        f"- at {alarm.rate:.2%}: `{alarm.candidate}` against `{alarm.baseline}`: {', '.join(alarm.beyond)}"
        for alarm in rare
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness alarms", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    options = parser.parse_args(argv)
    made = table([item for item in find(options.folders) if not item.fault])
    print(told(made))
    if options.json:
        options.json.write_text(made.model_dump_json(indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
