"""How far two right servers may differ: the null band of each dtype."""

from harness.frozen import Frozen


class Band(Frozen):
    """Bounds on what rounding alone does, in nats. Beyond any of them is a difference.

    `max_change`: largest |Δ logprob| of any token that both top-k lists hold. `p99_change`: 99th percentile of
    |Δ logprob| of the imposed token. `max_kl`: largest divergence of the top-k, the rest taken as one bucket.
    `margin`: a step whose best two tokens are further apart than this must keep its best token.
    """

    dtype: str
    max_change: float
    p99_change: float
    max_kl: float
    margin: float
    source: str


#: Measured on CPU, `recipe:llama-k4`, vLLM 0.32, a server made to follow another's tokens, so that only the order of
#: additions differs. fp32, TP1 against TP4 (29 prompts, 772 steps): largest change 5.0e-5, 99th percentile 1.2e-5, KL
#: 7.6e-8; one server asked twice: 0.0; Helix TP4/DCP2 against TP4: 4.6e-5, 1.2e-5, 5.3e-7. The bounds are about ten
#: times that. An unseen context token changes logprobs by 0.7 nat and more (`python -m harness.models.card`).
BANDS: dict[str, Band] = {
    band.dtype: band
    for band in (
        Band(
            dtype="float32",
            max_change=5e-4,
            p99_change=1e-4,
            max_kl=1e-5,
            margin=1e-3,
            source="TP1 against TP4 on CPU, fp32",
        ),
    )
}


def band_of(dtype: str) -> Band:
    """The band of `dtype`; a KeyError that names the measured ones otherwise."""
    if dtype not in BANDS:
        raise KeyError(f"no null band was measured for dtype {dtype}; measured: {', '.join(sorted(BANDS))}")
    return BANDS[dtype]
