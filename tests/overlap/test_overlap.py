"""HOP-B: micro-batches, their order, and the rule of how many there are."""

import threading

import pytest
import torch

from helix_runtime.combine.merge import merge_partials
from helix_runtime.overlap import (
    OverlapCosts,
    StreamLanes,
    ThreadLanes,
    Way,
    best_way,
    measured_count,
    micro_batches,
    overlapped,
    overlapped_once,
    predicted_us,
)

GPU = torch.cuda.is_available()


@pytest.mark.parametrize(
    "requests, count, sizes",
    [(8, 4, [2, 2, 2, 2]), (7, 3, [2, 3, 2]), (3, 8, [1, 1, 1]), (5, 1, [5]), (0, 4, [0])],
)
def test_micro_batches_cover_the_batch_in_order(requests, count, sizes):
    slices = micro_batches(requests, count)
    assert [part.stop - part.start for part in slices] == sizes
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(requests))


@pytest.mark.parametrize(
    "requests, count, halvings, sizes",
    [(62, 5, 4, [32, 16, 8, 4, 2]), (60, 4, 2, [22, 22, 11, 5]), (8, 5, 3, [3, 3, 1, 1]), (3, 6, 3, [2, 1])],
)
def test_the_last_micro_batches_may_be_halves(requests, count, halvings, sizes):
    """60 in weights 1, 1, 1/2, 1/4: 21.8 each, 10.9, 5.5. Slices that would be empty are left out."""
    slices = micro_batches(requests, count, halvings)
    assert [part.stop - part.start for part in slices] == sizes
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(requests))


def test_an_exchange_runs_beside_the_next_attention():
    """The first exchange waits for the second attention to have begun: without overlap this would never end."""
    second, log = threading.Event(), []

    def attend(index, part):
        if index == 1:
            second.set()
        return f"partial {index}"

    def exchange(index, part, partial):
        if index == 0:
            assert second.wait(10)
        log.append((index, part, partial))

    overlapped(micro_batches(5, 3), attend, exchange, ThreadLanes())
    assert log == [
        (0, slice(0, 2), "partial 0"),
        (1, slice(2, 3), "partial 1"),
        (2, slice(3, 5), "partial 2"),
    ]


def test_what_an_exchange_raises_reaches_the_caller_and_the_next_step_starts_clean():
    lanes = ThreadLanes()

    def fails(index, part, partial):
        raise ConnectionError("peer left")

    with pytest.raises(ConnectionError, match="peer left"):
        overlapped(micro_batches(4, 2), lambda index, part: None, fails, lanes)
    seen = []
    overlapped(micro_batches(4, 2), lambda index, part: index, lambda index, part, partial: seen.append(partial), lanes)
    assert seen == [0, 1]


@pytest.mark.parametrize("mode", [True, False])
def test_a_thread_of_exchanges_has_the_caller_s_inference_mode(mode):
    """Else what attention made in it could not be written by an exchange."""
    seen, lanes = [], ThreadLanes()
    with torch.inference_mode(mode):
        lanes.submit(lambda: seen.append(torch.is_inference_mode_enabled()))
    lanes.join()
    assert seen == [mode]


def test_one_micro_batch_uses_no_second_lane():
    class Forbidden:
        def submit(self, exchange):
            raise AssertionError("nothing to overlap")

    seen = []
    overlapped(
        [slice(0, 4)], lambda i, part: "p", lambda i, part, partial: seen.append((i, part, partial)), Forbidden()
    )
    assert seen == [(0, slice(0, 4), "p")]


def test_one_attention_is_issued_before_the_other_lanes_which_start_from_before_it():
    log = []

    class Log:
        def __init__(self, name):
            self.name = name

        def mark(self):
            log.append("mark")
            return "before"

        def submit(self, work, after=None):
            log.append(f"{self.name} after {after}")
            work()
            return f"{self.name}'s end"

        def join(self):
            log.append(f"{self.name} joined")

    overlapped_once(
        micro_batches(3, 2),
        lambda: log.append("attend") or "partial",
        lambda index, part, partial: log.append(("arrive", index, part, partial)) or f"rows {index}",
        lambda index, part, rows: log.append(("exchange", index, part, rows)),
        Log("exchanges"),
        Log("arrivals"),
    )
    each = [
        [
            "arrivals after before",
            ("arrive", index, part, "partial"),
            "exchanges after arrivals's end",
            ("exchange", index, part, f"rows {index}"),
        ]
        for index, part in enumerate([slice(0, 2), slice(2, 3)])
    ]
    assert log == ["mark", "attend", *each[0], *each[1], "arrivals joined", "exchanges joined"]


def test_rows_arrive_beside_an_exchange():
    """The first exchange waits for the second slice to have arrived: on one lane this would never end."""
    second, log = threading.Event(), []

    def arrive(index, part, partial):
        if index == 1:
            second.set()
        return partial[part]

    def exchange(index, part, rows):
        assert second.wait(10)
        log.append((index, rows))

    overlapped_once(micro_batches(3, 2), lambda: [10, 11, 12], arrive, exchange, ThreadLanes(), ThreadLanes())
    assert log == [(0, [10, 11]), (1, [12])]


def test_one_attention_with_one_exchange_uses_no_other_lane():
    seen = []
    overlapped_once(
        [slice(0, 4)], lambda: "p", lambda *given: given, lambda *given: seen.append(given), lanes=None, arrivals=None
    )
    assert seen == [(0, slice(0, 4), (0, slice(0, 4), "p"))]


@pytest.mark.parametrize("where", ["arrive", "exchange"])
def test_what_one_attentions_lanes_raise_reaches_the_caller_and_the_next_step_starts_clean(where):
    lanes, arrivals, fails, seen = ThreadLanes(), ThreadLanes(), True, []

    def at(name):
        def call(index, part, given):
            if fails and name == where and index == 1:
                raise ConnectionError("peer left")
            seen.append((name, index))

        return call

    step = (micro_batches(6, 3), lambda: None, at("arrive"), at("exchange"), lanes, arrivals)
    with pytest.raises(ConnectionError, match="peer left"):
        overlapped_once(*step)
    fails = False
    seen.clear()
    overlapped_once(*step)
    assert sorted(seen) == [(name, index) for name in ("arrive", "exchange") for index in range(3)]


def test_the_prediction_by_hand():
    """The paper: eight requests of 2 compute and 1.2 communication: 25.6 exposed, 8 * 2 + 1.2 = 17.2 hidden."""
    free = OverlapCosts(split=0, start=0, contention=0, slower=0, late=0)
    assert predicted_us(Way(1), 8, 16.0, 9.6, free) == pytest.approx(25.6)
    assert predicted_us(Way(8), 8, 16.0, 9.6, free) == pytest.approx(17.2)
    assert predicted_us(Way(8, once=True), 8, 16.0, 9.6, free) == pytest.approx(17.2)
    costs = OverlapCosts(split=1, start=2, contention=0.5, slower=0.1, late=0.2)
    # attention 100 + 40 / 2 = 120, its fourth done after 4 * (30 + 1), then an exchange of 40 / 4 + 2
    assert predicted_us(Way(4), 4, 100.0, 40.0, costs) == pytest.approx(136.0)
    # attention 110 + 20 = 130, all of it done at its end, where the last quarter's exchange begins
    assert predicted_us(Way(4, once=True), 4, 100.0, 40.0, costs) == pytest.approx(142.0)
    # slices of 2, 1, 1; exchange 400: starts after 330 / 2 + 20, and takes all of 400 + 3 * 2
    assert predicted_us(Way(3, 1, once=True), 4, 100.0, 400.0, costs) == pytest.approx(310 / 2 + 20 + 400 + 6)


@pytest.mark.parametrize(
    "requests, attention, exchange, several",
    [(64, 1000.0, 500.0, True), (8, 1000.0, 5.0, False), (8, 10.0, 5.0, False), (1, 1000.0, 500.0, False)],
)
def test_the_batch_is_cut_only_where_it_pays(requests, attention, exchange, several):
    way = best_way(requests, attention, exchange)
    assert (way.count > 1) == several and way.count <= requests


def test_the_rule_takes_only_what_it_is_offered():
    assert best_way(64, 1000.0, 500.0, ways=[Way(8, 3, once=True)]).once
    assert best_way(64, 1000.0, 500.0, ways=[Way(8)]) == Way(8)
    assert best_way(64, 1000.0, 500.0, ways=[]) == Way()


def test_the_measured_rule_keeps_one_unless_two_percent_are_saved():
    assert measured_count({1: 100.0, 2: 99.0, 4: 98.5}) == 1
    assert measured_count({1: 100.0, 2: 97.0, 4: 98.5}) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_two_streams_give_the_same_bits_and_replay_with_new_inputs():
    outputs = torch.randn(4, 16, 8, 128, device="cuda", dtype=torch.bfloat16)
    lses = torch.randn(4, 16, 8, device="cuda")
    result = torch.empty(16, 8, 128, device="cuda", dtype=torch.bfloat16)
    lanes = StreamLanes("cuda")

    def attend(index, part):
        return outputs[:, part] * 2, lses[:, part] + 1

    def exchange(index, part, partial):
        result[part] = merge_partials(*partial)[0]

    def step():
        overlapped(micro_batches(16, 5), attend, exchange, lanes)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        outputs.normal_()
        lses.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, merge_partials(outputs * 2, lses + 1)[0])
