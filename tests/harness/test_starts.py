"""The clean starts: enough of them, over all modes, with disjoint prompts, and none made twice."""

from collections import Counter

import pytest

from harness import starts
from harness.cell import Mode
from harness.oracle.band import measured_with
from harness.oracle.statistics import upper_share
from harness.starts import SETS, Group, Record, complete, main
from harness.transcript import Answer, Step, Transcript

PLAN = starts.starts()


def test_there_are_forty_over_all_modes_models_and_seeds():
    followers = [start for _, start in PLAN if not start.leads]
    assert len(followers) >= 40 and SETS == 5
    modes = Counter(start.cell.mode for start in followers)
    assert set(modes) == set(Mode)
    assert {start.cell.tp for start in followers if start.cell.baseline} >= {1, 2, 4, 8}
    assert {start.cell.comm for start in followers} >= {"a2a", "ag_rs"}
    assert {start.cell.interleave for start in followers} >= {1, 16, 32}
    models = {start.cell.model for start in followers}
    assert len(models) >= 8 and any("seed1" in model for model in models)
    names = [start.name for _, start in PLAN]
    assert len(set(names)) == len(names)


def test_every_group_has_one_baseline_and_it_comes_first():
    led: set[str] = set()
    for _, start in PLAN:
        assert start.leads or start.group in led
        if start.leads:
            assert start.group not in led and start.cell.baseline
            led.add(start.group)


def test_the_first_cover_all_and_bound_the_rate_out_of_sample():
    """41 starts of 8 groups, of which 26 are compared with a baseline by a null of their own: 7 + 6 + 3 + 3 + 2 + 2 + 1
    + 2. With twelve sets 312 comparisons; 0 of 299 bounds a rate at 1 %."""
    first = PLAN[: starts.FIRST]
    assert len({group.name for group, _ in first}) == 8
    assert starts.as_run(first) == 26
    assert upper_share(0, 298) > 0.01 >= upper_share(0, 299)
    assert starts.as_run(first) * starts.FIRST_SETS >= 299
    fresh = [item for item in first if not measured_with(item[0].dtype, item[0].model)]
    assert starts.as_run(fresh) * starts.FIRST_SETS >= 299
    followers = [start.cell for _, start in first if not start.leads]
    assert {cell.mode for cell in followers} == set(Mode)
    assert {group.dtype for group, _ in first} == {"float32", "bfloat16", "float16"}
    assert {cell.comm for cell in followers} >= {"a2a", "ag_rs"} and {cell.kvp for cell in followers} >= {2, 4}
    assert PLAN[starts.FIRST][1].leads  # no group is cut in two
    assert starts.as_run(first[:2]) == 0  # TP1 alone has no null but itself


@pytest.mark.parametrize("model", ["recipe:llama-k4", "recipe:llama-retrieve-k4"])
def test_prompt_sets_share_no_prompt_and_come_again(model):
    group = Group(model=model, tp=2)
    made = group.workloads(SETS)
    prompts = [{prompt.token_ids for prompt in workload.prompts} for _, workload in made]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    assert [workload.key for _, workload in made] == [workload.key for _, workload in group.workloads(SETS)]
    assert len({seed for seed, _ in made}) == SETS


def test_other_weights_are_another_model_of_the_same_shape():
    from harness.models.recipe import find

    one, other = find("llama-k4"), find("recipe:llama-k4-seed1")
    assert one.key != other.key and one.config() == other.config()
    assert find("deepseek-v2-seed2").seed == 2


class FakeServer:
    """Up at once; what it is asked is answered by `answers`."""

    def __init__(self, launch, log):
        self.launch = launch

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def small(monkeypatch):
    """Two starts of one group, on servers that answer every prompt with token 5; what each was asked."""
    group = Group(model="recipe:llama-k2", tp=2)
    lead, follow = group.cell(Mode.STANDARD_TP, 2), group.cell(Mode.HELIX_GQA, 2, 2, 16, "a2a")
    monkeypatch.setattr(starts, "groups", lambda: iter([(group, [follow])]))
    monkeypatch.setattr(starts, "Server", FakeServer)
    asked: list[tuple[str, str, bool, bool]] = []

    def answer(server, cell, workload, dtype, follow=None):
        forced = "--logits-processors" in server.launch.argv
        asked.append((str(cell.mode), workload.key, follow is not None, forced))
        step = Step(token_id=5, logprob=-0.1, top={5: -0.1})
        answers = tuple(
            Answer(prompt=p.name, kind=p.kind, prompt_length=1, batch=p.batch, forced=False, steps=(step,))
            for p in workload.prompts
        )  # fmt: skip
        return Transcript(
            cell_id=cell.id, cell_key=cell.key, workload_key=workload.key, dtype=dtype, vocab_size=512, top_k=1,
            answers=answers,
        )  # fmt: skip

    monkeypatch.setattr(starts, "answer_all", answer)
    return lead, asked


def test_a_start_is_saved_with_its_cell_and_made_once(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    lead, asked = small
    folder = tmp_path / "out"
    assert main([str(folder), "--sets", "2"]) == 0
    keys = [key for _, key, _, _ in asked]
    assert [(mode, led, forced) for mode, _, led, forced in asked] == [
        ("standard-tp", False, False),
        ("standard-tp", False, False),
        ("helix-gqa", True, True),
        ("helix-gqa", True, True),
    ]
    assert keys[:2] == keys[2:]
    record = Record.model_validate_json((folder / "llama-k2--baseline" / "start.json").read_text())
    assert record.start.cell == lead and len(record.workload_seeds) == 2
    assert Transcript.load(folder / "llama-k2-helix-gqa-tp2-dcp2-i16-a2a" / "set-1.json").workload_key == keys[1]
    assert main([str(folder), "--sets", "2"]) == 0
    assert len(asked) == 4  # nothing again
    capsys.readouterr()
    assert main([str(folder), "--list", "--sets", "3"]) == 0
    assert capsys.readouterr().out.count("missing") == 2  # a third set is wanted


def test_a_folder_of_another_cell_is_made_again(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    main([str(tmp_path / "out"), "--sets", "1"])
    (_, start), *_ = starts.starts()
    assert complete(tmp_path / "out", start, 1)
    other = start.model_copy(update={"cell": start.cell.model_copy(update={"tp": 4})})
    assert not complete(tmp_path / "out", other, 1)


def test_groups_side_by_side_and_a_limit(small, tmp_path, monkeypatch, capsys):
    """Only the first start; then both, by two threads; a baseline that fails fails what follows it."""
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    _, asked = small
    assert main([str(tmp_path / "out"), "--sets", "1", "--limit", "1"]) == 0
    assert [mode for mode, *_ in asked] == ["standard-tp"]
    assert main([str(tmp_path / "out"), "--sets", "1", "--jobs", "2"]) == 0
    assert [mode for mode, *_ in asked] == ["standard-tp", "helix-gqa"]

    def dies(*arguments, **options):
        raise OSError("no server")

    monkeypatch.setattr(starts, "answer_all", dies)
    assert main([str(tmp_path / "other"), "--sets", "1", "--jobs", "2"]) == 3
    assert capsys.readouterr().out.count("failed") == 2
