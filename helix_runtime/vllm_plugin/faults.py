"""Deliberate defects, switchable in a worker by name: `additional_config={"helix": {"fault": "NAME[:WHEN[,WHEN…]]"}}`.

They exist to test the oracle: a comparison that cannot tell these from a right answer proves nothing. A fault is armed
after the start-up self-test, which would refuse most of them. WHEN restricts a fault to some calls, rows or heads:
`drop-shard:layer=1,head=5`, `stale-lse:batch`, `drop-shard:every=100`; see `make_fault`. The defects themselves are in
`fault_merge.py` (what is sent and merged) and `fault_cache.py` (what is read, written, or never ran).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from helix_runtime.combine.collectives import Collectives
from helix_runtime.combine.merge import merge_partials
from helix_runtime.vllm_plugin.refusal import HelixRefusal


@dataclass(frozen=True)
class Site:
    """One layer's attention call on one rank: where a fault may strike.

    requests: batch rows. decode: every row has one new token. reads_context: some row with several new tokens also
    has tokens before them (a prefix hit or a second chunk). first_head: index, in the model, of the first query head
    that is computed here. seq_lens [R]: global lengths, new tokens included; query_start_loc [R + 1]: rows of each
    request; both None where no one says. layer is -1 where a batch's cache slots are chosen, once for all layers.
    """

    layer: int
    kvp_rank: int
    requests: int
    decode: bool
    reads_context: bool
    first_head: int
    seq_lens: torch.Tensor | None = None
    query_start_loc: torch.Tensor | None = None

    def positions(self) -> torch.Tensor:
        """Position, in its own sequence, of every new token: [T]."""
        starts, ends = self.query_start_loc[:-1].tolist(), self.query_start_loc[1:].tolist()
        lengths = self.seq_lens.tolist()
        rows = [
            torch.arange(length - (end - start), length)
            for start, end, length in zip(starts, ends, lengths, strict=True)
        ]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)


class Reading(NamedTuple):
    """What attention reads of a shard: query [T, H, D], block_table [R, blocks], scale of the scores."""

    query: torch.Tensor
    block_table: torch.Tensor
    scale: float


class Writing(NamedTuple):
    """Which slots a batch's new tokens are written to: slots [T] (-1: not here) at `positions` [T].

    slot_of: positions [T], as if the tokens stood there -> slots [T] of this rank.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    block_size: int
    interleave: int
    kvp: int
    slot_of: Callable[[torch.Tensor], torch.Tensor]


class Fault:
    """The points at which a defect can enter one layer's attention. This base class changes nothing."""

    lse_base = "e"

    def weights(self, model: torch.nn.Module, rank: int) -> None:
        """The model of this rank, loaded, before it is used."""

    def slots(self, writing: Writing, site: Site) -> torch.Tensor:
        """Slots [T] that the batch's keys and values are written to, on this rank."""
        return writing.slots

    def reads(self, reading: Reading, site: Site) -> Reading:
        """What attention reads."""
        return reading

    def local_lengths(self, lengths: torch.Tensor, site: Site) -> torch.Tensor:
        """Local lengths [R] of the batch before attention reads the shard."""
        return lengths

    def partial(self, output: torch.Tensor, lse: torch.Tensor, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's partial, [B, H, D] and [B, H], before it is sent."""
        return output, lse

    def replaces(self, output: torch.Tensor, lse: torch.Tensor, site: Site, group) -> torch.Tensor | None:
        """The merged output [B, H / KVP, D], where something else than the combine makes it; else None."""
        return None

    def collectives(self, collectives: Collectives) -> Collectives:
        """The collectives that the combine will use."""
        return collectives

    def merge(self, outputs: torch.Tensor, lses: torch.Tensor, base: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What the All-to-All combine does with all members' partials [N, B, h, D] and [N, B, h] of its own heads."""
        return merge_partials(outputs, lses, base)

    def merged(self, output: torch.Tensor, site: Site) -> torch.Tensor:
        """The merged output [B, H / KVP, D] of the heads that this rank owns."""
        return output


NO_FAULT = Fault()
FAULTS: dict[str, type[Fault]] = {}

#: WHEN -> does the fault strike at this site? `KEY=N` (NUMBERED) and the selective ones (SELECTIVE) are parsed apart.
CONDITIONS: dict[str, Callable[[Site], bool]] = {
    "batch": lambda site: site.requests > 1,
    "single": lambda site: site.requests == 1,
    "decode": lambda site: site.decode,
    "prefill": lambda site: not site.decode,
    "prefix": lambda site: site.reads_context,
}


def _every_call(every: int) -> Callable[[Site], bool]:
    """Every `every`-th attention call of this worker, the first one not; the choices of slots count apart."""
    calls: Counter[bool] = Counter()
    last: list[Site] = []

    def strikes(site: Site) -> bool:
        if not last or last[0] is not site:  # asked several times a call
            last[:] = [site]
            calls[site.layer < 0] += 1
        return calls[site.layer < 0] % every == 0

    return strikes


#: KEY of WHEN's `KEY=N`: N -> does the fault strike at this site?
NUMBERED: dict[str, Callable[[int], Callable[[Site], bool]]] = {
    "layer": lambda layer: lambda site: site.layer == layer,
    "rank": lambda rank: lambda site: site.kvp_rank == rank,
    "call": _every_call,
}


def fault(name: str):
    def register(cls: type[Fault]) -> type[Fault]:
        FAULTS[name] = cls
        return cls

    return register


class ArmedFault:
    """A fault and the sites at which it strikes."""

    def __init__(self, fault: Fault, strikes: Callable[[Site], bool]):
        self.fault = fault
        self.strikes = strikes

    def at(self, site: Site) -> Fault:
        return self.fault if self.strikes(site) else NO_FAULT


class _OneHead(Fault):
    """Another fault's partial, on one query head of the model only."""

    def __init__(self, whole: Fault, head: int):
        self.whole, self.head = whole, head

    def partial(self, output, lse, site):
        index = self.head - site.first_head
        if not 0 <= index < lse.shape[1]:
            return output, lse
        wrong_output, wrong_lse = self.whole.partial(output, lse, site)
        output, lse = output.clone(), lse.clone()
        output[:, index], lse[:, index] = wrong_output[:, index], wrong_lse[:, index]
        return output, lse


class _SomeTokens(Fault):
    """Another fault's partial and local lengths, for the tokens at some positions only."""

    def __init__(self, whole: Fault, struck: Callable[[torch.Tensor], torch.Tensor]):
        self.whole, self.struck = whole, struck

    def partial(self, output, lse, site):
        if site.seq_lens is None:
            return output, lse
        struck = self.struck(site.positions())
        wrong_output, wrong_lse = self.whole.partial(output, lse, site)
        return torch.where(struck[:, None, None], wrong_output, output), torch.where(struck[:, None], wrong_lse, lse)

    def local_lengths(self, lengths, site):
        if site.seq_lens is None:
            return lengths
        return torch.where(self.struck(site.seq_lens - 1), self.whole.local_lengths(lengths, site), lengths)


#: WHEN=N for faults of the partial (and, where tokens are chosen, of local lengths): N -> the fault so restricted.
SELECTIVE: dict[str, Callable[[Fault, int], Fault]] = {
    "head": _OneHead,
    "every": lambda whole, every: _SomeTokens(whole, lambda positions: positions % every == every - 1),
    "beyond": lambda whole, length: _SomeTokens(whole, lambda positions: positions >= length),
}

NOTHING_ARMED = ArmedFault(NO_FAULT, lambda site: False)


def make_fault(spec: str | None) -> ArmedFault:
    """The fault `NAME[:WHEN[,WHEN…]]`, or none for None. Raises HelixRefusal for unknown words, listing the known ones.

    WHEN is one of CONDITIONS, `layer=N`, `rank=N` (of each KVP group), `call=K` (every Kth attention call of a worker),
    or for some faults `head=N` (query head N of the model), `every=N` (tokens at every Nth position) or `beyond=N`
    (tokens with at least N before them). Of several, all must hold.
    """
    from helix_runtime.vllm_plugin import fault_cache, fault_merge  # noqa: F401  (they register themselves)

    if spec is None:
        return NOTHING_ARMED
    name, _, restrictions = spec.partition(":")
    if name not in FAULTS:
        raise HelixRefusal(f"no fault is called {name!r}; there are: {', '.join(sorted(FAULTS))}")
    kind = FAULTS[name]
    made, conditions = kind(), []
    for when in restrictions.split(",") if restrictions else ():
        if condition := _condition(when):
            conditions.append(condition)
        elif select := _selective(when, kind):
            made = select(made)
        else:
            raise _cannot_be_restricted(name, when)
    return ArmedFault(made, lambda site: all(holds(site) for holds in conditions))


def _condition(when: str) -> Callable[[Site], bool] | None:
    """Where a WHEN holds; None for one that is no condition of a site."""
    key, _, number = when.partition("=")
    if key in NUMBERED and number.isdigit() and int(number) >= (key == "call"):
        return NUMBERED[key](int(number))
    return CONDITIONS.get(when)


def _selective(when: str, kind: type[Fault]) -> Callable[[Fault], Fault] | None:
    """What restricts a fault of this kind to the heads or tokens of a WHEN; None for one that cannot."""
    key, _, number = when.partition("=")
    if key in SELECTIVE and number.isdigit() and int(number) >= (key != "head") and _selectable(kind, key):
        return lambda whole: SELECTIVE[key](whole, int(number))
    return None


def _cannot_be_restricted(name: str, when: str) -> HelixRefusal:
    by_head = ", ".join(sorted(known for known, cls in FAULTS.items() if _selectable(cls, "head")))
    by_token = ", ".join(sorted(known for known, cls in FAULTS.items() if _selectable(cls, "every")))
    return HelixRefusal(
        f"fault {name!r} cannot be restricted to {when!r}; allowed: {', '.join(CONDITIONS)}, layer=N, rank=N, call=K; "
        f"head=N for {by_head}; every=N and beyond=N for {by_token}; several with commas between"
    )


def describe(name: str) -> str:
    """What the fault `name` does, in one or two sentences. KeyError for an unknown one."""
    from helix_runtime.vllm_plugin import fault_cache, fault_merge  # noqa: F401

    return " ".join(FAULTS[name].__doc__.split())


def _selectable(kind: type[Fault], key: str) -> bool:
    return kind.partial is not Fault.partial or (key != "head" and kind.local_lengths is not Fault.local_lengths)
