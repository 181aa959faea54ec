"""Forced decode by position: in a batch that changes, and on a real server."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from harness.cell import Cell, Mode  # noqa: E402
from harness.client import answer_all  # noqa: E402
from harness.lease import lease_port  # noqa: E402
from harness.oracle.compare import compare  # noqa: E402
from harness.server.launch import FORCED_DECODE, make_launch  # noqa: E402
from harness.server.process import Server  # noqa: E402
from harness.transcript import Prompt  # noqa: E402
from harness.workload import Workload  # noqa: E402

INF = float("inf")


@pytest.fixture
def processor():
    from helix_runtime.vllm_plugin.forced_decode import ForcedDecode

    return ForcedDecode(None, torch.device("cpu"), False)


def params(tokens: object = None):
    from vllm import SamplingParams

    return SamplingParams(extra_args=None if tokens is None else {"helix_forced_tokens": tokens})


def update(processor, size: int, removed=(), added=(), moved=()):
    from vllm.v1.sample.logits_processor import BatchUpdate

    processor.update_state(BatchUpdate(batch_size=size, removed=removed, added=added, moved=moved))


def chosen(processor, rows: int) -> list[int]:
    """What greedy sampling takes of each row, where the model would take token 0."""
    logits = torch.zeros(rows, 8)
    logits[:, 0] = 1.0
    return processor.apply(logits).argmax(dim=-1).tolist()


def test_position_is_the_length_of_the_output(processor):
    output: list[int] = []
    update(processor, 2, added=[(0, params([5, 6, 7]), [1], output), (1, params(), [1], [])])
    seen = []
    for _ in range(4):
        row, free = chosen(processor, 2)
        assert free == 0  # a request that does not ask is left alone
        output.append(row)
        processor.update_state(None)
        seen.append(row)
    assert seen == [5, 6, 7, 0]  # past the end it is free again


def test_everything_but_the_wanted_token_is_masked(processor):
    update(processor, 1, added=[(0, params([5]), [1], [])])
    row = processor.apply(torch.zeros(1, 8))[0].tolist()
    assert row == [-INF, -INF, -INF, -INF, -INF, 0.0, -INF, -INF]


def test_moves_swaps_removals_and_resumption(processor):
    from vllm.v1.sample.logits_processor import MoveDirectionality

    first, second = [1], [1, 2]
    update(
        processor,
        3,
        added=[(0, params([3, 4, 5]), [1], first), (1, params([5, 6, 7]), [1], second), (2, params(), [1], [])],
    )
    assert chosen(processor, 3) == [4, 7, 0]
    update(processor, 3, moved=[(0, 1, MoveDirectionality.SWAP)])
    assert chosen(processor, 3) == [7, 4, 0]
    update(processor, 2, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert chosen(processor, 2) == [0, 4]
    update(processor, 1, removed=[1])  # preempted
    assert chosen(processor, 1) == [0]
    first.append(4)
    update(processor, 2, added=[(1, params([3, 4, 5]), [1], first)])  # resumed with what it had
    assert chosen(processor, 2) == [0, 5]


def test_a_token_outside_the_vocabulary_forces_nothing(processor):
    update(processor, 1, added=[(0, params([8]), [1], [])])
    assert chosen(processor, 1) == [0]


@pytest.mark.parametrize("tokens", ["5,6", [5, "6"], [-1], [1.5]])
def test_bad_requests_are_refused_by_validation(processor, tokens):
    with pytest.raises(ValueError, match="list of token ids"):
        type(processor).validate_params(params(tokens))


@pytest.mark.server
def test_a_real_server_gives_its_own_logprobs_back(tmp_path):
    """Forcing a run's own greedy tokens changes nothing: 0.0; forcing other tokens gives exactly those."""
    serve = (
        ("dtype", "float32"), ("max-model-len", 256), ("block-size", 32), ("enforce-eager", True), ("max-num-seqs", 2),
        ("kv-cache-memory-bytes", 2**24), ("max-num-batched-tokens", 256),
    )  # fmt: skip
    cell = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k2", tp=1, serve=serve)
    prompts = tuple(
        Prompt(name=f"p{n}", kind="batch", why="w", token_ids=tuple(range(4, 5 + n)), max_tokens=12, batch=1)
        for n in (0, 3, 40, 90)  # four requests on two seats: rows move
    )
    workload = Workload(profile="smoke", vocab=512, prompts=prompts)
    with lease_port() as port:
        launch = make_launch(cell, tmp_path, port)
        launch = launch.model_copy(update={"argv": (*launch.argv, "--logits-processors", FORCED_DECODE)})
        with Server(launch, tmp_path / "server.log") as server:
            free = answer_all(server, cell, workload, "float32")
            same = answer_all(server, cell, workload, "float32", follow=free)
            turned = tuple(a.model_copy(update={"steps": a.steps[::-1]}) for a in free.answers)
            other = answer_all(server, cell, workload, "float32", follow=free.model_copy(update={"answers": turned}))
    found = compare(free, same)
    assert len(found.steps) == 4 * 12 and found.missing == []
    assert max(step.widest for step in found.steps) == 0.0
    for asked, answered in zip(turned, other.answers, strict=True):
        assert [step.token_id for step in answered.steps] == [step.token_id for step in asked.steps]
