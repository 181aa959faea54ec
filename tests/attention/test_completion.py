"""Attention that says which rows are done: on a GPU where there is one, else in Triton's interpreter, one at a time."""

import importlib
import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before the import below
pytest.importorskip("triton", reason="our attention kernels need Triton; not installed")

from helix_runtime.attention import completion, split_kv, split_kv_code, triton_decode  # noqa: E402
from helix_runtime.overlap import StreamLanes, ThreadLanes, micro_batches, overlapped_once  # noqa: E402

if not GPU:
    for module in (completion, split_kv_code, split_kv, triton_decode):
        importlib.reload(module)  # another test may have imported it for compilation

DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
PAGE, DIM, HEADS, KV_HEADS = 16, 64, 4, 2
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")


class Step:
    """A batch of random rows; `plain` attends it at once, `run` with the rows of each micro-batch joined on a lane."""

    def __init__(self, lengths, splits, count):
        pages = -(-max(lengths) // PAGE)
        random = torch.Generator().manual_seed(len(lengths))
        self.query = torch.randn(len(lengths), HEADS, DIM, generator=random).to(DEVICE, DTYPE)
        cache = torch.randn(len(lengths) * pages, 2, PAGE, KV_HEADS, DIM, generator=random)
        self.cache = cache.to(DEVICE, DTYPE)
        self.table = torch.randperm(len(cache), generator=random).view(len(lengths), pages).to(DEVICE, torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.kernel = triton_decode.TritonDecode(DIM**-0.5, splits=splits)
        self.slices = micro_batches(len(lengths), count)
        self.done = completion.counters(len(lengths), DEVICE)
        self.lanes, self.arrivals = (StreamLanes("cuda") if GPU else ThreadLanes() for _ in range(2))
        self.outputs, self.lses = self.blank()

    @property
    def arguments(self):
        return self.query, self.cache, self.table, self.lengths

    def blank(self):
        outputs = torch.full((1, *self.query.shape), float("nan"), dtype=DTYPE, device=DEVICE)
        return outputs, torch.full(outputs.shape[:3], float("nan"), device=DEVICE)

    def plain(self):
        outputs, lses = self.blank()
        self.kernel.send(*self.arguments, outputs, lses)
        return outputs, lses

    def run(self, before=lambda: None):
        def attend():
            before()
            return self.kernel.begin(*self.arguments, done=self.done)

        def arrive(_, rows, parts):
            arrived = self.kernel.arrived(parts, rows, self.done, KV_HEADS)
            sent = self.outputs[:, rows].clone(), self.lses[:, rows].clone()
            self.kernel.finish(arrived, *sent)
            return sent

        def exchange(_, rows, sent):
            self.outputs[:, rows], self.lses[:, rows] = sent

        overlapped_once(self.slices, attend, arrive, exchange, self.lanes, self.arrivals)

    def check(self):
        outputs, lses = self.plain()
        assert torch.equal(self.outputs, outputs) and torch.equal(self.lses, lses)
        assert not self.done.any()


@pytest.mark.parametrize("splits, count", [(1, 3), (3, 1), (3, 2), (5, 4)])
def test_rows_joined_as_they_are_done_have_the_bits_of_the_whole_batch(splits, count):
    step = Step([40, 0, 70, 16], splits, count)
    for _ in range(2):  # the counters are ready for a second step
        step.run()
        step.check()


def test_every_program_of_a_row_counts_an_empty_row_too():
    step = Step([40, 0, 70], 3, 1)
    step.kernel.begin(*step.arguments, done=step.done)
    assert step.done.tolist() == [3 * KV_HEADS] * 3
    completion.wait_for(step.done[1:], 3 * KV_HEADS)
    assert step.done.tolist() == [3 * KV_HEADS, 0, 0]
    completion.wait_for(step.done[:0], 3 * KV_HEADS)
    assert step.done.tolist() == [3 * KV_HEADS, 0, 0]


@pytest.mark.gpu
@needs_gpu
def test_a_wait_that_begins_before_the_attention_sees_all_of_it():
    step = Step([900, 1, 0, 2000, 64, 512, 3, 1000], 16, 4)
    step.run()
    for _ in range(5):
        step.outputs.fill_(float("nan"))
        step.run(before=lambda: torch.cuda._sleep(2_000_000))  # about a millisecond, in which the waits spin
        torch.cuda.synchronize()
        step.check()


@pytest.mark.gpu
@needs_gpu
def test_a_captured_step_is_replayed_with_other_lengths():
    step = Step([3000] * 24, 16, 8)
    step.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    random = torch.Generator().manual_seed(1)
    for _ in range(50):
        lengths = torch.randint(0, 3000, (24,), generator=random) * torch.randint(0, 2, (24,), generator=random)
        step.lengths.copy_(lengths)
        step.query.normal_()
        step.outputs.fill_(float("nan"))
        for _ in range(3):  # one after the other: what one leaves is what the next begins with
            graph.replay()
        torch.cuda.synchronize()
        step.check()
