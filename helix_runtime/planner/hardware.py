"""GPUs as data: `hardware.json`, every figure with where it was read. Bytes, bytes/s and flop/s from here on."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "hardware.json"

#: Bytes of one weight or KV value. FP4 without its block scales, as the paper counts it.
BYTES = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5}
_WIDER = {"fp4": "fp8", "fp8": "bf16"}


#: NCCL sends up to this many bytes to a peer by a protocol that waits less (LL; `NCCL_P2P_LL_THRESHOLD`, a channel).
LL_BYTES = 16384


class PlannerError(ValueError):
    """A question that cannot be answered; the text says what is allowed and what to try."""


@dataclass(frozen=True)
class Wait:
    """Seconds of a collective of a few bytes on one rank, extrapolated, how they grow with every doubling of the ranks,
    and what is added where a peer gets more than `LL_BYTES`."""

    latency: float
    per_doubling: float
    large: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links. `link` is NVLink in one direction, within a domain of `domain` GPUs; `network` beyond."""

    key: str
    name: str
    family: str  # of `capabilities.HARDWARE`
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    flops: dict[str, float]  # dense, by dtype
    link: float  # bytes/s
    domain: int
    network: float  # bytes/s
    latency: float  # seconds of a collective on one rank, extrapolated; it grows by
    latency_per_doubling: float  # … with every doubling of the ranks, and beyond a domain by
    network_latency: float
    sources: tuple[str, ...]
    collectives: dict[str, Wait]  # of those that were measured, in place of the two latencies above

    def wait(self, kind: str) -> Wait:
        """Of `all-reduce`, `all-to-all` or `all-gather`."""
        return self.collectives.get(kind, Wait(self.latency, self.latency_per_doubling))

    def arithmetic(self, dtype: str) -> float:
        """flop/s with operands of `dtype`; the next wider one where the GPU has none."""
        while dtype not in self.flops:
            dtype = _WIDER[dtype]
        return self.flops[dtype]


def load_gpu(name: str, file: Path = FILE) -> Gpu:
    """The GPU called `name` in `file`. PlannerError with the known ones."""
    entries = json.loads(file.read_text())
    key = name.lower()
    if key not in entries:
        near = difflib.get_close_matches(key, entries, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise PlannerError(
            f"no figures for hardware {name!r}; {hint}known: {', '.join(entries)} (add one to {file.name})"
        )
    entry = entries[key]
    return Gpu(
        key=key,
        name=entry["name"],
        family=entry["family"],
        memory=entry["memory_gb"] * 1e9,
        bandwidth=entry["bandwidth_gbps"] * 1e9,
        flops={dtype: value * 1e12 for dtype, value in entry["tflops"].items()},
        link=entry["link_gbps"] * 1e9,
        domain=entry["domain"],
        network=entry["network_gbps"] * 1e9,
        latency=entry["latency_us"] * 1e-6,
        latency_per_doubling=entry["latency_us_per_doubling"] * 1e-6,
        network_latency=entry["network_latency_us"] * 1e-6,
        sources=tuple(entry["sources"]),
        collectives={
            kind: Wait(**{name: us * 1e-6 for name, us in waits.items()})
            for kind, waits in entry.get("collectives_us", {}).items()
        },
    )


def known_gpus(file: Path = FILE) -> tuple[str, ...]:
    return tuple(json.loads(file.read_text()))


def named_gpu(device: str) -> Gpu | None:
    """The GPU that a driver calls `device` (`NVIDIA H200`), or None."""
    words = device.lower().replace("-", " ").split()
    return next((load_gpu(key) for key in known_gpus() if key in words), None)
