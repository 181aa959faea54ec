"""Forced decode in the V2 model runner, through the interface that its sampler calls, on CPU tensors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")

from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

from harness.cell import Cell, Mode
from harness.server.launch import FORCED_DECODE, FORCED_DECODE_V2, forced_decode
from helix_runtime.vllm_plugin.forced_decode_v2 import ForcedDecodeV2

SLOTS, VOCAB = 4, 8


class Runner:
    """What the V2 sampler does around a processor: slots with prompt lengths, rows in any order, raw logits kept."""

    def __init__(self):
        self.prompt_len = SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32))
        self.processor = ForcedDecodeV2(None, SimpleNamespace(prompt_len=self.prompt_len))
        self.asks = [False] * SLOTS

    def add(self, slot: int, prompt_length: int, tokens: object = None) -> None:
        extra = None if tokens is None else {"helix_forced_tokens": tokens}
        self.prompt_len.np[slot] = prompt_length
        self.asks[slot] = self.processor.add_request(slot, SamplingParams(extra_args=extra))

    def sample(self, batch: list[tuple[int, int]]) -> list[int]:
        """`batch`: (slot, tokens visible to the one that is sampled) of each row; the model would take token 0."""
        slots = np.array([slot for slot, _ in batch])
        rows = torch.tensor(slots)
        context = LogitsContext(
            expanded_idx_mapping=rows, idx_mapping=rows, idx_mapping_np=slots,
            expanded_local_pos=torch.zeros(len(batch)), input_ids=rows, pos=rows,
            seq_lens_upper_bound_np=np.array([length for _, length in batch], dtype=np.int32),
        )  # fmt: skip
        logits = torch.zeros(len(batch), VOCAB)
        logits[:, 0] = 1.0
        return self.processor.apply(logits, context).argmax(-1).tolist()


@pytest.fixture
def runner():
    return Runner()


def test_position_is_the_length_less_the_prompt(runner):
    runner.add(2, 10, [5, 6, 7])
    assert runner.asks[2]
    assert [runner.sample([(2, length)]) for length in (10, 11, 12, 13)] == [[5], [6], [7], [0]]


def test_rows_are_in_any_order_and_others_are_free(runner):
    runner.add(0, 3, [1, 2])
    runner.add(1, 5)
    runner.add(3, 4, [6, 7])
    assert not runner.asks[1]
    assert runner.sample([(3, 5), (1, 9), (0, 3)]) == [7, 0, 1]


def test_an_unfinished_prefill_is_left_alone(runner):
    runner.add(0, 100, [5])
    assert runner.sample([(0, 64)]) == [0]
    assert runner.sample([(0, 100)]) == [5]


def test_a_slot_that_is_used_again_forgets(runner):
    runner.add(0, 3, [5, 5, 5])
    runner.add(0, 3)
    assert runner.sample([(0, 4)]) == [0]
    runner.add(0, 7, [6])
    assert runner.sample([(0, 7)]) == [6]


def test_a_resumed_request_goes_on_in_another_slot(runner):
    runner.add(0, 3, [4, 5, 6])
    assert runner.sample([(0, 3)]) == [4]
    # Preempted after one token: it comes back with prompt and output to prefill, and its own prompt length.
    runner.add(2, 3, [4, 5, 6])
    assert runner.sample([(2, 4)]) == [5]


def test_everything_else_is_masked(runner):
    runner.add(0, 1, [5])
    rows = torch.zeros(1)
    context = SimpleNamespace(idx_mapping_np=np.array([0]), seq_lens_upper_bound_np=np.array([1]), idx_mapping=rows)
    row = runner.processor.apply(torch.zeros(1, VOCAB), context)[0].tolist()
    assert row == [float("-inf")] * 5 + [0.0] + [float("-inf")] * 2


def test_a_token_outside_the_vocabulary_forces_nothing(runner):
    runner.add(0, 1, [VOCAB])
    assert runner.sample([(0, 1)]) == [0]


@pytest.mark.parametrize("tokens", ["5,6", [5, "6"], [-1], [1.5]])
def test_bad_requests_are_refused_by_validation(tokens):
    with pytest.raises(ValueError, match="list of token ids"):
        ForcedDecodeV2.validate_params(SamplingParams(extra_args={"helix_forced_tokens": tokens}))


def test_vllms_v2_loader_takes_this_class_and_not_the_other():
    assert _load_v2_logitsprocs_by_fqcns([FORCED_DECODE_V2]) == [ForcedDecodeV2]
    with pytest.raises(ValueError, match="not a subclass"):
        _load_v2_logitsprocs_by_fqcns([FORCED_DECODE])


def test_a_server_gets_the_class_of_its_runner(monkeypatch):
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    cpu = Cell(mode=Mode.HELIX_GQA, backend="HELIX_CPU", hardware="cpu", model="recipe:llama-k4", tp=4, kvp=2)
    gpu = cpu.model_copy(update={"hardware": "hopper", "backend": "FLASH_ATTN"})
    v1 = gpu.model_copy(update={"env": (("VLLM_USE_V2_MODEL_RUNNER", "0"),)})
    assert [forced_decode(cell) for cell in (cpu, gpu, v1)] == [FORCED_DECODE, FORCED_DECODE_V2, FORCED_DECODE]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert [forced_decode(cell) for cell in (cpu, v1)] == [FORCED_DECODE_V2, FORCED_DECODE]
