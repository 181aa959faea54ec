"""What `benchmarks.overlap` measured, read again: its records by attention and exchange, and their table."""

from dataclasses import dataclass

from benchmarks.records import Record, Results
from helix_runtime.overlap import WAYS, Way, best_way, measured_count


def way_of(params: dict) -> Way | None:
    """The way that a record's cut is; results without `way` are of attentions for each micro-batch."""
    if "way" in params:
        return Way(*params["way"]) if params["way"] else None
    return None if params.get("room") else Way(params["micro_batches"], params.get("halvings", 0))


@dataclass(frozen=True)
class Group:
    """The steps of one attention with one exchange."""

    records: list[Record]

    @property
    def whole(self) -> Record:
        return next(record for record in self.records if record.params["micro_batches"] == 1)

    @property
    def several(self) -> list[Record]:
        return [record for record in self.records if record.params["micro_batches"] >= 5]

    @property
    def ways(self) -> dict[Way, Record]:
        """Those of the rule that were measured, and `Way()`."""
        found = {way_of(record.params): record for record in self.records}
        return {way: found[way] for way in (Way(), *WAYS) if way in found}

    @property
    def alone(self) -> tuple[int, float, float]:
        """Requests, and microseconds of attention and exchange."""
        return self.whole.params["batch"], self.whole.extra["attention_us"], self.whole.extra["exchange_us"]


def groups(results: Results) -> list[Group]:
    """Largest share first, exchanges at a link's rate before those at none."""
    order = {case: number for number, case in enumerate(dict.fromkeys(r.extra["case"] for r in results.records))}
    found: dict[tuple, list[Record]] = {}
    for record in results.records:
        if record.name == "overlap/step":
            params = record.params
            link, programs = params.get("exchange_link_gbps"), params["exchange_programs"]
            key = (-params["exchange_share"], not link, order[record.extra["case"]], programs)
            found.setdefault((*key, link or 0, record.extra["case"]), []).append(record)
    return [Group(found[key]) for key in sorted(found)]


def table(results: Results) -> str:
    """Markdown: one line for each attention, exchange and share."""
    lines = [
        "| attention | exchange | attention µs | exchange µs | one after the other µs | micro-batches | µs | hidden |"
        " measured rule: micro-batches, change | predicting rule |",
        "|" + " --- |" * 10,
    ]
    for group in groups(results):
        if not group.several:
            continue
        whole, best = group.whole, min(group.several, key=lambda record: record.us)
        by_count: dict[int, Record] = {}
        for record in group.records:
            count = record.params["micro_batches"]
            by_count[count] = min(by_count.get(count, record), record, key=lambda record: record.us)
        chosen = by_count[measured_count({count: record.us for count, record in by_count.items()})]
        ways = group.ways
        predicted = ways[best_way(*group.alone, ways=list(ways))]
        params, programs = best.params, best.params["exchange_programs"]
        rate, threads = params.get("exchange_rate_gbps"), params["exchange_threads"] // programs
        cells = [
            best.extra["case"],
            f"{programs} x {threads} threads, {f'{rate:g} GB/s' if rate else 'no link'}, "
            f"{params['exchange_bytes'] / 2e6:.1f} MB, {params['exchange_share']:g} of the attention",
            f"{best.extra['attention_us']:.1f}",
            f"{best.extra['exchange_us']:.1f}",
            f"{whole.us:.1f}",
            best.extra["cut"],
            f"{best.us:.1f}",
            f"{best.extra['hidden']:.2f}",
            f"{chosen.params['micro_batches']}, {chosen.us / whole.us - 1:+.1%}",
            f"{predicted.params['micro_batches']}, {predicted.us / whole.us - 1:+.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
