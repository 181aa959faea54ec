"""Deliberate defects, switchable in a worker by name: `additional_config={"helix": {"fault": "NAME[:WHEN]"}}`.

They exist to test the oracle: a comparison that cannot tell these from a right answer proves nothing. A fault is armed
after the start-up self-test, which would refuse most of them. WHEN restricts a fault to some calls or one head:
`drop-shard:layer=1`, `stale-lse:batch`, `lse-base-2:prefix`, `drop-shard:head=3`; see `CONDITIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from helix_runtime.combine.collectives import Collectives
from helix_runtime.vllm_plugin.refusal import HelixRefusal


@dataclass(frozen=True)
class Site:
    """One layer's attention call on one rank: where a fault may strike.

    requests: batch rows. decode: every row has one new token. reads_context: some row with several new tokens also
    has tokens before them (a prefix hit or a second chunk). first_head: index, in the model, of the first query head
    that is computed here.
    """

    layer: int
    kvp_rank: int
    requests: int
    decode: bool
    reads_context: bool
    first_head: int


class Fault:
    """The points at which a defect can enter one layer's attention. This base class changes nothing."""

    lse_base = "e"

    def local_lengths(self, lengths: torch.Tensor, site: Site) -> torch.Tensor:
        """Local lengths [R] of the batch before attention reads the shard."""
        return lengths

    def partial(self, output: torch.Tensor, lse: torch.Tensor, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's partial, [B, H, D] and [B, H], before it is sent."""
        return output, lse

    def collectives(self, collectives: Collectives) -> Collectives:
        """The collectives that the combine will use."""
        return collectives


NO_FAULT = Fault()
FAULTS: dict[str, type[Fault]] = {}

#: WHEN -> does the fault strike at this site? `layer=N` and `head=N` are parsed apart.
CONDITIONS: dict[str, Callable[[Site], bool]] = {
    "batch": lambda site: site.requests > 1,
    "single": lambda site: site.requests == 1,
    "decode": lambda site: site.decode,
    "prefill": lambda site: not site.decode,
    "prefix": lambda site: site.reads_context,
}


def fault(name: str):
    def register(cls: type[Fault]) -> type[Fault]:
        FAULTS[name] = cls
        return cls

    return register


@fault("swap-chunks")
class SwapChunks(Fault):
    """The first two ranks of each group get each other's heads (as TensorRT-LLM#10350: wrong rank order)."""

    def collectives(self, collectives):
        def swapped(exchange):
            def call(output, input, *, group):
                order = [1, 0, *range(2, input.shape[0])]
                return exchange(output, input[order].contiguous(), group=group)

            return call

        return collectives._replace(
            all_to_all=swapped(collectives.all_to_all), reduce_scatter=swapped(collectives.reduce_scatter)
        )


@fault("lse-base-2")
class LseBase2(Fault):
    """Natural LSEs are merged as base 2 (as sglang#40903 and vllm#52796, the other way round)."""

    lse_base = "2"


@fault("drop-shard")
class DropShard(Fault):
    """The second shard of each group never arrives."""

    def partial(self, output, lse, site):
        return (output, torch.full_like(lse, float("-inf"))) if site.kvp_rank == 1 else (output, lse)


@fault("local-length-off-by-one")
class LocalLengthOffByOne(Fault):
    """The first shard of each group misses its newest token (as vLLM 0.15-0.29's wrong local lengths)."""

    def local_lengths(self, lengths, site):
        return (lengths - 1).clamp(min=0) if site.kvp_rank == 0 else lengths


@fault("stale-lse")
class StaleLse(Fault):
    """The LSE of the call before is sent where its shape fits (as vllm#36070: a buffer that nobody refreshed)."""

    def __init__(self):
        self.before: torch.Tensor | None = None

    def partial(self, output, lse, site):
        stale, self.before = self.before, lse.clone()
        return output, stale if stale is not None and stale.shape == lse.shape else lse


class ArmedFault:
    """A fault and the sites at which it strikes."""

    def __init__(self, fault: Fault, strikes: Callable[[Site], bool], head: int | None = None):
        self.fault = _OneHead(fault, head) if head is not None else fault
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


NOTHING_ARMED = ArmedFault(NO_FAULT, lambda site: False)


def make_fault(spec: str | None) -> ArmedFault:
    """The fault `NAME[:WHEN]`, or none for None. Raises HelixRefusal for unknown words, listing the known ones."""
    if spec is None:
        return NOTHING_ARMED
    name, _, when = spec.partition(":")
    if name not in FAULTS:
        raise HelixRefusal(f"no fault is called {name!r}; there are: {', '.join(sorted(FAULTS))}")
    key, _, number = when.partition("=")
    if not when:
        return ArmedFault(FAULTS[name](), lambda site: True)
    if when in CONDITIONS:
        return ArmedFault(FAULTS[name](), CONDITIONS[when])
    if key == "layer" and number.isdigit():
        return ArmedFault(FAULTS[name](), lambda site: site.layer == int(number))
    if key == "head" and number.isdigit() and FAULTS[name].partial is not Fault.partial:
        return ArmedFault(FAULTS[name](), lambda site: True, head=int(number))
    heads = ", ".join(sorted(known for known, cls in FAULTS.items() if cls.partial is not Fault.partial))
    raise HelixRefusal(
        f"fault {name!r} cannot be restricted to {when!r}; allowed: {', '.join(CONDITIONS)}, layer=N, "
        f"and head=N for {heads}"
    )
