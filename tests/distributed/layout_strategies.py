"""Hypothesis strategies for layouts: requests of every kind, and models that any of the modes can serve."""

import math
from dataclasses import dataclass

from hypothesis import strategies as st

from helix_runtime.capabilities import HARDWARE, backends
from helix_runtime.layout import Layout, LayoutError, resolve_layout


@dataclass(frozen=True)
class Request:
    """Arguments of `resolve_layout`, as somebody may ask for them."""

    tp: int
    dcp: int
    query_heads: int
    kv_heads: int
    use_mla: bool
    helix_mode: bool
    backend: str | None
    hardware: str | None
    interleave: int
    block: int | None
    allow_gqa_tpa1: bool

    def resolve(self) -> Layout | LayoutError:
        try:
            return resolve_layout(
                self.tp,
                self.dcp,
                self.query_heads,
                self.kv_heads,
                self.use_mla,
                self.helix_mode,
                self.backend,
                self.hardware,
                interleave_size=self.interleave,
                block_size=self.block,
                allow_gqa_tpa1=self.allow_gqa_tpa1,
                head_size=64,
            )
        except LayoutError as refusal:
            return refusal


@st.composite
def requests(draw) -> Request:
    """Half of them have sizes that divide each other, as legal layouts do; the others are whatever comes."""
    sizes = st.sampled_from((1, 2, 3, 4, 6, 8, 12, 16))
    tp, dcp, query_heads, kv_heads = draw(sizes), draw(sizes), draw(sizes), draw(sizes)
    if draw(st.booleans()):
        kv_heads = draw(st.sampled_from((1, 2, 4, 6, 8)))
        tp = dcp * draw(st.sampled_from((1, 2, 3, 4)))
        query_heads = math.lcm(tp, kv_heads) * draw(st.sampled_from((1, 2)))
    use_mla = draw(st.booleans())
    return Request(
        tp=tp,
        dcp=dcp,
        query_heads=query_heads,
        kv_heads=kv_heads,
        use_mla=use_mla,
        helix_mode=draw(st.booleans()),
        backend=draw(st.none() | st.sampled_from(backends()) | st.sampled_from(backends(mla=use_mla))),
        hardware=draw(st.none() | st.sampled_from(tuple(HARDWARE))),
        interleave=draw(st.sampled_from((1, 8, 16, 48))),
        block=draw(st.sampled_from((None, 16, 64))),
        allow_gqa_tpa1=draw(st.booleans()),
    )
