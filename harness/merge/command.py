"""`python -m harness merge DIR…`: the runs in these folders as one run with one report."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness import ledger
from harness.frozen import content_hash
from harness.merge.join import Joined, join
from harness.merge.mixes import KINDS, lost_shards, mixes, uncoded
from harness.merge.source import NothingToMerge, Source, few, find_sources
from harness.plain import clean, plural
from harness.suite import REPORTS
from harness.verdict import exit_status

USAGE = 2
INFRASTRUCTURE = 3
_WARNED = 20


def main(argv: Sequence[str]) -> int:
    """Exit status 0: complete and as declared; 1: a verdict differs; 2: refused; 3: results are missing, or a line
    or all of a ledger could not be used."""
    parser = argparse.ArgumentParser(prog="python -m harness merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="a run's folder, or a folder of runs")
    parser.add_argument("--into", type=Path, metavar="DIR", help="new folder (default reports/runs/TIME-merged-HASH)")
    parser.add_argument(
        "--allow", action="append", default=[], choices=KINDS, help="merge although these differ; repeatable"
    )
    options = parser.parse_args(argv)
    try:
        sources, empty = find_sources(options.runs)
    except NothingToMerge as problem:
        return _complain(str(problem))
    found = mixes(sources)
    if refused := [mix for mix in found if mix.kind not in options.allow]:
        told = "\n".join(f"  {mix.sentence} (--allow {mix.kind})" for mix in refused)
        return _complain(f"these runs would mislead as one matrix:\n{told}")
    folder = options.into or REPORTS / "runs" / _name(sources)
    joined = join(sources)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            return _complain(f"{folder} is there and not empty; name a new folder: --into DIR")
        page = merge(sources, joined, folder)
    except OSError as problem:
        why = "it is a file" if isinstance(problem, FileExistsError) else problem.strerror or problem
        return _complain(f"cannot write into {folder}: {why}; name a new folder that can be made: --into DIR")
    print(f"merged {', '.join(source.name for source in sources)}")
    print("\n".join(f"allowed: {mix.sentence}" for mix in found), end="\n" if found else "")
    if unknown := uncoded(sources):
        print(f"code not recorded in {few(unknown)}")
    lost = lost_shards(sources)
    print("\n".join([*joined.lines(), *(f"  shard {shard} is missing" for shard in lost)]))
    print(f"report: {page}")
    unread = [f"{source.name}: {clean(line)}" for source in sources for line in source.unread]
    for line in [*map(clean, empty), *unread[:_WARNED]]:
        print(f"merge: warning: {line}", file=sys.stderr)
    if unread:
        told = f"{plural(len(unread), 'line')} could not be read, and may have held results"
        print(f"merge: warning: {told}; all are in {folder / 'expected.json'}", file=sys.stderr)
    status = exit_status([(one.result.declared, one.result.verdict) for one in joined.final])
    return status or (INFRASTRUCTURE if joined.missing or lost or unread or empty else 0)


def merge(sources: Sequence[Source], joined: Joined, folder: Path) -> Path:
    """Write the merged ledger, what is missing (`expected.json`) and the report into the folder; returns the page."""
    from harness import report

    (folder / ledger.NAME).write_text("".join(json.dumps(event) + "\n" for event in _events(sources, joined, folder)))
    expected = {
        "expected": len(joined.expected), "got": joined.got, "missing": dict(joined.missing),
        "skipped": joined.skipped, "overruled": joined.overruled, "shards missing": lost_shards(sources),
        "runs": {str(source.folder): source.run for source in sources},
        "unread": {source.name: source.unread for source in sources if source.unread},
    }  # fmt: skip
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
    return report.write(folder)


def _events(sources: Sequence[Source], joined: Joined, folder: Path) -> list[dict]:
    hardware = dict.fromkeys(name for source in sources for name in source.hardware)
    cards = {json.dumps(card, sort_keys=True): card for source in sources for card in source.models}
    start = {
        "event": "run-start", "run": folder.name, "planned": list(joined.expected), "hardware": list(hardware),
        "argv": ["merge", *(str(source.folder) for source in sources)], "chosen": {},
        "merged": [source.name for source in sources],
        "asked": [source.chosen and source.chosen.model_dump(mode="json") for source in sources],
        "codes": [list(source.codes) for source in sources],
        "time": sources[-1].started or ledger.now(),
    }  # fmt: skip
    attempts = [event for source in sources for event in source.attempts]
    return [
        start, *attempts, *(record.event for record in joined.records),
        *([{"event": "models", "models": list(cards.values())}] if cards else []),
        {"event": "run-end", "time": ledger.now()},
    ]  # fmt: skip


def _name(sources: Sequence[Source]) -> str:
    unique = content_hash([*(source.name for source in sources), time.time_ns()])[:6]
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-merged-{unique}"


def _complain(message: str) -> int:
    print(f"merge: error: {message}", file=sys.stderr)
    return USAGE
