"""What is asked of a server: the same prompts for a baseline and all cells that it serves, and why each exists.

The list depends only on what baseline and cells share (TP, block size, vocabulary, longest context, profile, seed), so
it covers every KVP that divides TP and every interleave that the suites cross, whichever cell asks.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from harness.cell import Cell
from harness.frozen import Frozen, content_hash
from harness.transcript import Prompt

Profile = Literal["smoke", "standard"]

#: Interleave sizes that suites cross; the block size itself is added.
INTERLEAVES = (1, 16)
DEFAULT_BLOCK = 128  # vLLM's own on CPU
#: Lengths of long prompts; the first, or what fits of it, is always asked, and again for a prefix hit. While it
#: decodes, alone, it crosses from one block and one owner to the next.
LONG = (1982, 9000, 66_000)
#: The longest prompt where attention is slow, in tokens, by hardware; elsewhere the context is the bound.
LONGEST = {"cpu": 10_000}
FULL_BATCH = 1
BOUNDARY_BATCH = 2  # the number of the batch in which boundary prompts go out together
NEEDLE_BATCH = 3
ABORT_BATCH = 4
REUSE_BATCH = 5
#: Requests whose client hangs up: prompt length, tokens it waits for. Each asks for ABORTED_TOKENS.
ABORTED = ((40, 1), (150, 3), (220, 6))
ABORTED_TOKENS = 1000
NEIGHBOUR_TOKENS = 12  # beyond the last of ABORTED
#: Lengths of needle prompts, as far as they fit; beyond the first, one is asked, as they are slow.
NEEDLE_LENGTHS = (600, 8000, 64_000)
#: No more seats than these are filled: the server of a GPU has hundreds.
MOST_SEATS = 32
FIRST_WORD = 4  # below are special tokens


class Budget(Frozen):
    """How much a profile asks: generated tokens of a boundary prompt, of a long one, of a batched one, of the long
    decode, and the length of that one's prompt. The full batch and the long decode together step on every position
    from the first to well beyond 128, so that a defect of some positions only cannot lie between prompts.

    thorough: the boundary of every rank and of the second round, and prompts longer than the first of LONG.
    """

    boundary: int
    long: int
    batched: int
    decode: int
    decode_from: int
    batch_lengths: tuple[int, ...]
    aborts: bool
    thorough: bool


BUDGETS: dict[str, Budget] = {
    "smoke": Budget(
        boundary=8,
        long=4,
        batched=16,
        decode=40,
        decode_from=60,
        batch_lengths=(1, 3, 16, 31, 46, 99, 114, 129, 257, 510, 766),
        aborts=False,
        thorough=False,
    ),
    "standard": Budget(
        boundary=12,
        long=8,
        batched=32,
        decode=70,
        decode_from=62,
        batch_lengths=(1, 2, 5, 9, 17, 32, 131, 162, 193, 224, 255, 400, 702),
        aborts=True,
        thorough=True,
    ),
}


class Workload(Frozen):
    """Prompts in the order in which they are asked; those of one non-zero `batch` go out at the same time."""

    profile: str
    vocab: int
    prompts: tuple[Prompt, ...]

    @property
    def key(self) -> str:
        return content_hash(self.model_dump(mode="json"))

    def told(self) -> str:
        """What is asked, in one line: how many prompts of each kind, how long, how many tokens are generated."""
        kinds = Counter(prompt.kind for prompt in self.prompts)
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        return (
            f"workload {self.profile}: {len(self.prompts)} prompts of {min(lengths)} to {max(lengths):,} tokens "
            f"({', '.join(f'{count} {kind}' for kind, count in kinds.items())}), "
            f"{sum(prompt.max_tokens for prompt in self.prompts):,} tokens to generate"
        )


def workload_of(cell: Cell, vocab: int, max_model_len: int) -> Workload:
    """The workload of `cell` and of its baseline. `vocab`, `max_model_len` (tokens) are the model's.

    `PROFILE@TP` asks a cell (TP1, the reference of baselines) what cells with that TP are asked.
    """
    serve = dict(cell.serve)
    profile, _, tp = cell.workload.partition("@")
    return make_workload(
        tp=int(tp or cell.tp),
        block=int(serve.get("block-size", DEFAULT_BLOCK)),
        vocab=vocab,
        max_model_len=min(max_model_len, int(serve.get("max-model-len", max_model_len))),
        profile=profile,
        seed=int(serve.get("seed", 0)),
        retrieves=cell.model if "-retrieve" in cell.model else None,
        longest=LONGEST.get(cell.hardware),
        seats=int(serve.get("max-num-seqs", 0)),
    )


def make_workload(
    tp: int,
    block: int,
    vocab: int,
    max_model_len: int,
    profile: str = "standard",
    seed: int = 0,
    retrieves: str | None = None,
    longest: int | None = None,
    seats: int = 0,
) -> Workload:
    """`retrieves` names a recipe that looks things up, which is asked for needles as well. `longest` bounds prompts.
    `seats`: requests that the server runs at the same time, which one batch fills; 0: not known.

    Raises KeyError for an unknown profile, ValueError when the context is too short to ask anything.
    """
    if profile not in BUDGETS:
        raise KeyError(f"no workload {profile!r}; there are: {', '.join(sorted(BUDGETS))}")
    budget = BUDGETS[profile]
    least = budget.decode_from + budget.decode + 1
    if max_model_len < least:
        raise ValueError(f"workload {profile} needs max-model-len of at least {least}, not {max_model_len}")
    prompts: list[Prompt] = []

    def add(
        kind: str, why: str, length: int, max_tokens: int, batch: int = 0, words: str = "", abort: int | None = None
    ) -> None:
        name = f"{len(prompts):02d}-{kind}-{length}"
        tokens = _tokens(words or name, length, vocab, seed)
        prompts.append(
            Prompt(
                name=name, kind=kind, why=why, token_ids=tokens, max_tokens=max_tokens, batch=batch, abort_after=abort
            )
        )

    def fits(length: int, tokens: int) -> bool:
        return 0 < length <= max_model_len - tokens

    for length, why in sorted(boundaries(tp, block, budget.thorough).items()):
        if fits(length, budget.boundary):
            # The first goes alone: a batch of one, while shards turn from empty to not. The others go together, which
            # saves time: ranks that share few cores take as long for a step of one row as for a step of twenty.
            add("boundary", why, length, budget.boundary, batch=0 if length == 1 else BOUNDARY_BATCH)
    long = min(LONG[0], max_model_len - budget.batched)
    why = f"{long} tokens: many blocks on every rank, several prefill chunks where chunks are small"
    add("long", why, long, budget.long, words="long")
    add("repeat", "the long prompt again: a prefix hit must give the same answer", long, budget.long, words="long")
    for length in LONG[1:] if budget.thorough else ():
        if fits(length, budget.batched) and length <= (longest or length):
            add("long", f"{length:,} tokens: defects that only long contexts show", length, budget.batched)
    why = f"decode of {budget.decode} tokens crosses owners and blocks, in a full batch and then alone"
    add("decode", why, budget.decode_from, budget.decode, batch=FULL_BATCH)
    for length in budget.batch_lengths:
        if fits(length, budget.batched):
            why = "one of a full batch of mixed lengths: rows must not read each other's shards"
            add("batch", why, length, budget.batched, batch=FULL_BATCH)
    taken = sum(prompt.batch == FULL_BATCH for prompt in prompts)
    for number in range(min(seats, MOST_SEATS) - taken):
        # Each begins a new block, and a new run of its owner, while the batch is full: a small cache runs out here.
        length = 2 * block - 4 - number % (block // 4)
        if fits(length, budget.batched):
            why = f"takes one of the {seats} seats that are left, and grows past {2 * block} tokens in a full batch"
            add("batch", why, length, budget.batched, batch=FULL_BATCH)
    if budget.aborts:
        aborted = [(length, after) for length, after in ABORTED if fits(length, 2 * budget.batched)]
        for length, after in aborted:
            why = f"its client hangs up after {after} tokens: the others must not notice"
            tokens = min(ABORTED_TOKENS, max_model_len - length)
            add("aborted", why, length, tokens, batch=ABORT_BATCH, abort=after)
            add("neighbour", "goes on while others are dropped", length + 7, NEIGHBOUR_TOKENS, batch=ABORT_BATCH)
        for length, _ in aborted:
            for more in (-3, 5):
                why = "takes the slot and the blocks of a dropped request: nothing of it must be left"
                add("reuse", why, length + more, budget.boundary // 2, batch=REUSE_BATCH)
    if retrieves:
        lengths = [length for length in NEEDLE_LENGTHS if fits(length, tp) and length <= (longest or length)]
        for why, tokens, answer in needles(retrieves, tp, seed, lengths):
            if fits(len(tokens), answer):
                name = f"{len(prompts):02d}-needle-{len(tokens)}"
                prompts.append(
                    Prompt(name=name, kind="needle", why=why, token_ids=tokens, max_tokens=answer, batch=NEEDLE_BATCH)
                )
    return Workload(profile=profile, vocab=vocab, prompts=tuple(prompts))


def needles(
    recipe: str, tp: int, seed: int, lengths: Iterable[int] = NEEDLE_LENGTHS[:1]
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(why, prompt, tokens to generate) of chains whose every decode step must read one known shard.

    What lies in each shard of KVP = TP lies in each shard of any KVP that divides it, so one long chain serves all.
    """
    from harness.models.retrieval import make_chain, place_in_shard

    sizes = [size for size in range(2, tp + 1) if tp % size == 0]
    for length in lengths:
        short = length == NEEDLE_LENGTHS[0]
        for kvp in sizes if short else sizes[-1:]:
            for interleave in INTERLEAVES if short else INTERLEAVES[-1:]:
                places = [
                    place_in_shard(length, kvp, interleave, rank, depth=(rank + 1) / (kvp + 1)) for rank in range(kvp)
                ]
                question = make_chain(recipe, length, places, seed)
                why = f"step i looks up a value that lies in the shard of rank i: KVP {kvp}, interleave {interleave}"
                yield why, question.tokens, len(question.expected)


def boundaries(tp: int, block: int, thorough: bool = True) -> dict[int, str]:
    """Prompt length -> why, around every place where ownership of tokens changes for some KVP of this TP.

    A place is where a rank gets its first token (`interleave * r` tokens are before it) and where a round of all ranks
    is full; with an interleave as large as a block, blocks are. Not `thorough`: the last rank and the first round only.
    """
    found: dict[int, list[str]] = {}
    for kvp in (size for size in range(2, tp + 1) if tp % size == 0):
        ranks = range(1, kvp) if thorough else (kvp - 1,)
        for unit in sorted({*INTERLEAVES, block}):
            name = f"{'block' if unit == block else 'interleave'} {unit}"
            places = {unit * rank: f"{name}, rank {rank} of KVP {kvp} is empty up to here" for rank in ranks}
            places |= {
                unit * kvp * k: f"{f'{k} x ' if k > 1 else ''}{name} x KVP {kvp}"
                for k in ((1, 2) if thorough else (1,))
            }
            for place, where in places.items():
                for offset in (-1, 0, 1):
                    found.setdefault(place + offset, []).append(f"{where}{offset:+d}" if offset else where)
    if not found:  # TP 1 has no KVP; a few lengths around the block remain
        found = {1: ["one token"], block - 1: ["block-1"], block: ["block"], block + 1: ["block+1"]}
    return {length: "ownership changes here: " + "; ".join(whys) for length, whys in found.items() if length > 0}


def _tokens(words: str, length: int, vocab: int, seed: int) -> tuple[int, ...]:
    """Random ordinary tokens, the same for the same words; other words share no prefix worth a cache hit."""
    spice = int(content_hash(words), 16)
    random = np.random.Generator(np.random.PCG64([seed, spice]))
    return tuple(random.integers(FIRST_WORD, vocab, size=length).tolist())
