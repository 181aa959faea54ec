"""Transcripts made from logits: a model that is random but fixed, and servers that add noise of a known size."""

from collections.abc import Callable

import numpy as np

from harness.transcript import Answer, Step, Transcript

VOCAB = 64
TOP_K = 20

#: (prompt name, class, prompt length, batch, steps) of every prompt that is asked unless a test says otherwise.
PROMPTS = tuple(
    (f"{kind}-{number}", kind, length + number, batch, 24)
    for kind, length, batch in (("boundary", 5, 0), ("long", 300, 0), ("batch", 40, 1))
    for number in range(6)
)

#: (prompt, kind, step, logits) -> logits
Fault = Callable[[str, str, int, np.ndarray], np.ndarray]


def server(
    noise: float,
    seed: int,
    *,
    cell: str = "cpu/standard-tp/CPU_ATTN/made/tp4",
    forced: bool = True,
    dtype: str = "float32",
    workload: str = "w",
    prompts=PROMPTS,
    fault: Fault | None = None,
) -> Transcript:
    """What a server answers whose logits are off by normal noise of standard deviation `noise`.

    All servers of a workload hold the same tokens: the best of the noiseless model, as if imposed.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    answers = []
    for name, kind, length, batch, count in prompts:
        model = np.random.Generator(np.random.PCG64([hash_of(name), hash_of(workload)]))
        steps = []
        for index in range(count):
            exact = 4.0 * model.standard_normal(VOCAB)
            logits = exact + noise * random.standard_normal(VOCAB)
            if fault is not None:
                logits = fault(name, kind, index, logits)
            steps.append(step_of(int(np.argmax(exact)), logits))
        answers.append(
            Answer(prompt=name, kind=kind, prompt_length=length, batch=batch, forced=forced, steps=tuple(steps))
        )
    return Transcript(
        cell_id=cell, cell_key=f"made-{seed}", workload_key=workload, dtype=dtype, vocab_size=VOCAB, top_k=TOP_K,
        answers=tuple(answers),
    )  # fmt: skip


def step_of(token: int, logits: np.ndarray) -> Step:
    logprobs = logits - np.log(np.sum(np.exp(logits)))
    best = np.argsort(-logprobs)[:TOP_K]
    return Step(
        token_id=token, logprob=float(logprobs[token]), top={int(index): float(logprobs[index]) for index in best}
    )


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big") % 2**63
