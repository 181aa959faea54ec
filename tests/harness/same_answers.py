"""Two transcripts of the same cell from two places: what must be equal, and how far."""

from harness.transcript import Transcript

#: Between two runs, prompts of a batch meet in other steps, which rounds their sums otherwise (fp32, nats).
BATCHED = 1e-4


def same(inside: Transcript, outside: Transcript) -> None:
    """Equal in every token; in every bit where the prompt went alone, else within the rounding of other batches."""
    assert inside.workload_key == outside.workload_key and inside.counts == outside.counts
    alone = 0
    for ours, theirs in zip(inside.answers, outside.answers, strict=True):
        assert [step.token_id for step in ours.steps] == [step.token_id for step in theirs.steps], ours.prompt
        if ours.batch == 0:
            assert ours == theirs
            alone += len(ours.steps)
        for a, b in zip(ours.steps, theirs.steps, strict=True):
            assert abs(a.logprob - b.logprob) < BATCHED
            assert all(abs(a.top[token] - b.top[token]) < BATCHED for token in a.top.keys() & b.top.keys())
    assert alone >= 16  # the first boundary prompt, the long one and its repeat
