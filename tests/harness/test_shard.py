"""Cutting a plan into parts, by hand-computed loads."""

import pytest

from harness.cell import Cell, Mode
from harness.matrix import PlannedCell
from harness.shard import Shard, cut, parse
from harness.verdict import Verdict

BASE = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k4", tp=4)
TP1 = BASE.model_copy(update={"tp": 1, "workload": "standard@4"})
HELIX = Cell(mode=Mode.HELIX_GQA, backend="HELIX_CPU", hardware="cpu", model="recipe:llama-k4", tp=4, kvp=2)


def helix(interleave: int) -> Cell:
    return HELIX.model_copy(update={"interleave": interleave})


def planned(cell: Cell, baseline: Cell | None = None, skip: str | None = None) -> PlannedCell:
    return PlannedCell(cell=cell, suites=("s",), declared=Verdict.PASS, declared_why="w", baseline=baseline, skip=skip)


PLAN = [planned(TP1), planned(BASE, TP1), *(planned(helix(size), BASE) for size in (1, 2, 4, 8))]
TIMES = {TP1.id: 10, BASE.id: 20, helix(1).id: 100, helix(2).id: 60, helix(4).id: 50, helix(8).id: 5}


def ids(part):
    return [item.cell.id for item in part]


def test_parts_are_balanced_and_bring_their_baselines():
    # 100 -> part 1 (130 with its chain); 60 -> part 2 (90), 50 -> part 2 (140), 5 -> part 1 (135)
    first, second = cut(PLAN, 2, TIMES)
    assert ids(first) == [TP1.id, BASE.id, helix(1).id, helix(8).id]
    assert ids(second) == [TP1.id, BASE.id, helix(2).id, helix(4).id]


def test_every_cell_has_one_home_and_one_part_is_the_plan():
    for parts in (1, 2, 3, 7):
        found = cut(PLAN, parts, TIMES)
        homes = [cell_id for part in found for cell_id in ids(part) if "helix" in cell_id]
        assert sorted(homes) == sorted(helix(size).id for size in (1, 2, 4, 8)) and len(found) == parts
    assert cut(PLAN, 1, {})[0] == PLAN


def test_a_cell_that_nobody_timed_takes_as_long_as_the_usual_one():
    # median of 10, 20, 90 is 20: four cells of 20 each beside one of 90
    plan = [planned(helix(size)) for size in (1, 2, 4, 8, 16)]
    first, second = cut(plan, 2, {helix(1).id: 90, "another": 10, "a third": 20})
    assert ids(first) == [helix(1).id] and len(second) == 4


def test_skipped_cells_cost_nothing_and_bring_no_baseline():
    away = [planned(BASE, skip="no GPU"), *(planned(helix(size), BASE, skip="no GPU") for size in (1, 4, 8, 16))]
    parts = cut([*away, planned(helix(2))], 3, {})
    assert [len(part) for part in parts] == [2, 2, 2]


def test_cells_are_cut_alike_whatever_the_order_of_times():
    assert cut(PLAN, 3, TIMES) == cut(PLAN, 3, dict(reversed(TIMES.items())))


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "a/b", "1/0", "-1/2"])
def test_bad_shards_say_what_is_allowed(text):
    with pytest.raises(ValueError, match="allowed: I/N"):
        parse(text)


def test_a_shard_is_shown_as_it_is_written():
    assert str(parse("2/3")) == "2/3" and parse("2/3") == Shard(2, 3)
