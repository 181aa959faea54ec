"""The verdict table and the exit status."""

import itertools

import pytest

from harness.verdict import DECLARABLE, TABLE, Effect, Verdict, effect_of, exit_status

PASS, FAIL, ERROR, SKIP, REJECTED = Verdict.PASS, Verdict.FAIL, Verdict.ERROR, Verdict.SKIP, Verdict.REJECTED


def test_every_verdict_has_a_meaning_and_a_shape_of_its_own():
    assert set(TABLE) == set(Verdict)
    assert len({meaning.symbol for meaning in TABLE.values()}) == len(Verdict)
    assert all(meaning.sentence for meaning in TABLE.values())


@pytest.mark.parametrize(
    ("pairs", "status"),
    [
        ([], 0),
        ([(PASS, PASS), (REJECTED, REJECTED), (Verdict.XFAIL, Verdict.XFAIL)], 0),
        ([(PASS, SKIP)], 0),
        ([(PASS, ERROR)], 3),
        ([(PASS, ERROR), (PASS, PASS)], 3),
        ([(PASS, ERROR), (PASS, FAIL)], 1),
        ([(Verdict.XFAIL, Verdict.XPASS)], 1),
        ([(PASS, Verdict.UNPROVEN)], 1),
        ([(PASS, Verdict.FLAKY)], 1),
        ([(PASS, REJECTED)], 1),  # a refusal that nobody declared
        ([(REJECTED, FAIL)], 1),  # a declared refusal that did not come
        ([(PASS, Verdict.STALE)], 0),
        ([(FAIL, FAIL), (FAIL, Verdict.UNPROVEN)], 0),  # deliberate defects that were caught
        ([(FAIL, FAIL), (FAIL, PASS)], 1),  # … and one that was not
        ([(FAIL, REJECTED)], 1),
        ([(FAIL, ERROR)], 3),
    ],
)
def test_exit_status(pairs, status):
    assert exit_status(pairs) == status


def test_one_wins_over_three_in_any_order():
    for pairs in itertools.permutations([(PASS, ERROR), (PASS, FAIL), (PASS, PASS)]):
        assert exit_status(list(pairs)) == 1


@pytest.mark.parametrize("declared", DECLARABLE)
def test_infrastructure_never_speaks_about_helix(declared):
    assert effect_of(declared, ERROR) is Effect.INFRASTRUCTURE
