"""The client on the stub server: what it asks, imposes, and writes down."""

import pytest
from test_server import server

from harness.cell import Cell, Mode
from harness.client import answer_all, read_steps
from harness.counts import read_counts
from harness.counts import running as requests_running
from harness.lease import lease_port
from harness.observe import dropped
from harness.oracle.compare import compare
from harness.server.process import ServerFailed
from harness.transcript import Prompt
from harness.workload import Workload

CELL = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k4", tp=1)


def workload() -> Workload:
    def prompt(name: str, batch: int = 0) -> Prompt:
        return Prompt(name=name, kind="k", why="w", token_ids=(3, len(name)), max_tokens=4, batch=batch)

    return Workload(profile="smoke", vocab=64, prompts=(prompt("a"), prompt("bb", 1), prompt("ccc", 1), prompt("dddd")))


@pytest.fixture
def running(tmp_path, request):
    with lease_port() as port, server(request.param, port, tmp_path) as made:
        yield made


@pytest.mark.parametrize("running", ["well"], indirect=True)
def test_answers_are_complete_and_forcing_imposes_them(running):
    free = answer_all(running, CELL, workload(), "float32")
    assert [answer.prompt for answer in free.answers] == ["a", "bb", "ccc", "dddd"]
    # the stub's first token is the sum of the prompt: 3 + 1
    first = free.answers[0].steps[0]
    assert (
        first.token_id == 4
        and first.top == {4: -0.2} | {4 + rank: -2.0 * rank for rank in range(1, 20)}
        and not free.answers[0].forced
    )
    chosen = [answer.model_copy(update={"steps": tuple(s.model_copy(update={"token_id": 9}) for s in answer.steps)})
              for answer in free.answers]  # fmt: skip
    forced = answer_all(running, CELL, workload(), "float32", free.model_copy(update={"answers": tuple(chosen)}))
    assert all(step.token_id == 9 for answer in forced.answers for step in answer.steps)
    assert all(answer.forced and len(answer.steps) == 4 for answer in forced.answers)


def cancelled() -> Workload:
    """One request whose client hangs up after 3 of 400 tokens, beside one of 5."""
    dropped = Prompt(name="d", kind="aborted", why="w", token_ids=(3,), max_tokens=400, batch=1, abort_after=3)
    beside = Prompt(name="n", kind="neighbour", why="w", token_ids=(4,), max_tokens=5, batch=1)
    return Workload(profile="standard", vocab=64, prompts=(dropped, beside))


@pytest.mark.parametrize("running", ["well"], indirect=True)
def test_the_client_hangs_up_midway_and_the_server_counts_little_more(running):
    found = answer_all(running, CELL, cancelled(), "float32")
    assert [(len(answer.steps), answer.waived) for answer in found.answers] == [(3, 397), (5, 0)]
    # tokens 3, then 3 + 3 + 7, as in an answer that is not streamed
    assert [step.token_id for step in found.answers[0].steps][:2] == [3, 13]
    assert 8 <= found.counts.generated < 8 + 397 / 2 and found.counts.cached == 0
    assert dropped(found) is None
    again = answer_all(running, CELL, cancelled(), "float32", found)
    assert all(answer.forced for answer in again.answers) and dropped(again) is None


@pytest.mark.parametrize("running", ["never-drops"], indirect=True)
def test_a_server_that_goes_on_for_nobody_is_found_out(running):
    assert "did not drop them" in dropped(answer_all(running, CELL, cancelled(), "float32"))


@pytest.mark.parametrize("running", ["counts-nothing"], indirect=True)
def test_without_counts_nothing_proves_that_requests_were_dropped(running):
    found = answer_all(running, CELL, cancelled(), "float32")
    assert found.counts is None and "does not count" in dropped(found)
    assert dropped(answer_all(running, CELL, workload(), "float32")) is None


def test_metrics_are_summed_over_labels_and_missing_ones_are_no_zero():
    text = (
        "# HELP vllm:generation_tokens_total t\n"
        'vllm:generation_tokens_total{engine="0"} 5.0\nvllm:generation_tokens_total{engine="1"} 2.0\n'
        'vllm:prefix_cache_hits_total{engine="0"} 448.0\nvllm:num_requests_running{engine="0"} 3.0\n'
    )
    assert read_counts(text) is None
    counted = read_counts(text + "vllm:num_preemptions_total 1.0\n")
    assert (counted.generated, counted.cached, counted.preempted) == (7, 448, 1)
    assert requests_running(text) == 3 and requests_running("") == 0


@pytest.mark.parametrize("running", ["ignores-forcing"], indirect=True)
def test_a_server_that_does_not_follow_is_found_out(running):
    free = answer_all(running, CELL, workload(), "float32")
    turned = [answer.model_copy(update={"steps": answer.steps[::-1]}) for answer in free.answers]
    found = answer_all(running, CELL, workload(), "float32", free.model_copy(update={"answers": tuple(turned)}))
    assert [answer.forced for answer in found.answers] == [False] * len(turned)
    assert [answer.steps for answer in found.answers] == [answer.steps for answer in free.answers]
    assert not compare(free, found).forced


@pytest.mark.parametrize("running", ["http-500"], indirect=True)
def test_a_refused_request_is_an_answer_without_steps(running):
    assert [answer.steps for answer in answer_all(running, CELL, workload(), "float32").answers] == [()] * 4


@pytest.mark.parametrize("running", ["dies-answering"], indirect=True)
def test_death_while_answering_is_said_with_its_cause(running):
    with pytest.raises(ServerFailed, match="the engine fell over"):
        answer_all(running, CELL, workload(), "float32")


def test_the_imposed_token_is_no_member_of_the_top():
    top = {f"token_id:{i}": -0.1 * i for i in range(1, 21)} | {"token_id:99": -30.0}
    reply = {"choices": [{"token_ids": [99], "logprobs": {"token_logprobs": [-30.0], "top_logprobs": [top]}}]}
    (step,) = read_steps(reply)
    assert step.logprob == -30.0 and len(step.top) == 20 and 99 not in step.top


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{"token_ids": [1], "logprobs": None}]}])
def test_what_is_no_completion_is_refused(reply):
    with pytest.raises(ValueError, match="not a completion"):
        read_steps(reply)
