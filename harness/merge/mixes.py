"""Mixes of runs that would mislead when drawn as one matrix: other suites, other versions, other code of ours."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from harness.cell import Cell
from harness.frozen import content_hash
from harness.merge.source import Source, few
from harness.plain import plural
from helix_runtime.capability_rows import NIGHTLY

KINDS = ("suites", "versions", "code")


class Mix(NamedTuple):
    """`kind` is the word that allows it."""

    kind: str
    sentence: str


def mixes(sources: Sequence[Source]) -> list[Mix]:
    """Every way in which `sources` do not belong together."""
    return [*_suites(sources), *_cells(sources), *_versions(sources), *_code(sources)]


def _suites(sources: Sequence[Source]) -> Iterator[Mix]:
    """What the runs were asked for. Where a ledger does not say, the suites of its cells stand for it."""
    asked = defaultdict(list)
    for source in sources:
        asked[_asked(source) if all(one.chosen for one in sources) else _suites_of(source)].append(source.name)
    if len(asked) > 1:
        told = "; ".join(f"{what or 'all suites'} ({', '.join(names)})" for what, names in asked.items())
        yield Mix("suites", f"the runs were asked for different cells: {told}")


def _asked(source: Source) -> str:
    chosen = source.chosen
    cells = [cell for cell in chosen.cells if set("*?[") & set(cell)]  # by full names: a part of a run
    return " ".join([*sorted(chosen.suites), *(f"--cell {cell}" for cell in sorted(cells))])


def _suites_of(source: Source) -> str:
    return " ".join(sorted({suite for record in source.last for suite in record.result.suites}))


def _cells(sources: Sequence[Source]) -> Iterator[Mix]:
    """The same id must mean the same cell, of which the same is expected."""
    cells, declared = defaultdict(list), defaultdict(set)
    for source in sources:
        for record in source.last:
            cells[record.result.cell.id].append(record.result.cell)
            declared[record.result.cell.id].add(record.result.declared)
    if differs := {cell_id: parts for cell_id, found in cells.items() if (parts := _differing(found))}:
        parts = sorted(set().union(*differs.values()))
        what = f"{', '.join(parts)} {'differs' if len(parts) == 1 else 'differ'}"
        stand = f"{plural(len(differs), 'id')} {'stands' if len(differs) == 1 else 'stand'}"
        yield Mix("suites", f"{stand} for different cells ({what}): {few(sorted(differs))}")
    if names := sorted(cell_id for cell_id, found in declared.items() if len(found) > 1):
        yield Mix("suites", f"{plural(len(names), 'name')} declared otherwise in different runs: {few(names)}")


def _differing(cells: Sequence[Cell]) -> set[str]:
    """The fields of the key that are not the same in all. The order of serve options is none: ledgers of shared GPUs
    have `enforce-eager` last."""
    first, *others = ({**dict(cell), "serve": tuple(sorted(cell.serve, key=itemgetter(0)))} for cell in cells)
    return {
        name
        for other in others
        for name, value in other.items()
        if name not in ("expect", "why") and repr(value) != repr(first[name])
    }


def _versions(sources: Sequence[Source]) -> Iterator[Mix]:
    """vLLM (of cells that ask for the same) and Helix everywhere; torch on the same hardware beside the same vLLM: each
    release of it brings its own. No local suffixes."""
    found: dict[tuple[str, str], dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for source in sources:
        for record in source.last:
            if not record.judged:
                continue
            cell, versions = record.result.cell, dict(record.result.versions)
            asked = cell.vllm_version
            if asked == NIGHTLY:  # hosts take that image at times of their own
                asked += f" on {cell.hardware}"
            places = {"vllm": asked, "helix": "", "torch": f"{cell.hardware}, vLLM {cell.vllm_version}"}
            for name, where in places.items():
                if name in versions:
                    found[name, where][versions[name].partition("+")[0]][source.name] = None
    for (name, where), by_version in found.items():
        if len(by_version) > 1:
            told = "; ".join(f"{version} in {', '.join(names)}" for version, names in sorted(by_version.items()))
            at = {"vllm": f" of cells for vLLM {where}", "torch": f" on {where}"}.get(name, "")
            yield Mix("versions", f"different versions of {name}{at}: {told}")


def _code(sources: Sequence[Source]) -> Iterator[Mix]:
    found = defaultdict(list)
    for source in sources:
        for code in filter(None, source.codes):
            found[code].append(source.name)
    if len(found) > 1:
        told = "; ".join(f"{code} in {', '.join(names)}" for code, names in found.items())
        yield Mix("code", f"the runs ran different code of this repository: {told}")


def uncoded(sources: Sequence[Source]) -> list[str]:
    """Those of `sources` whose ledgers do not say what code ran, so that it is compared with none."""
    return [
        source.name if source.codes == ("",) else f"a part of {source.name}" for source in sources if "" in source.codes
    ]


def lost_shards(sources: Sequence[Source]) -> list[str]:
    """Parts of a plan that are not among `sources`, as `2/3`."""
    groups: dict[tuple[str, int], set[int]] = defaultdict(set)
    for source in sources:
        if source.chosen and source.chosen.shard:
            part, _, parts = source.chosen.shard.partition("/")
            groups[content_hash(sorted(source.expected)), int(parts)].add(int(part))
    return [
        f"{part}/{parts}" for (_, parts), there in groups.items() for part in range(1, parts + 1) if part not in there
    ]
