"""What a vLLM server counts of itself, read from the text of its `/metrics`."""

import re

from harness.transcript import Counts

_METRICS = {
    "generated": "vllm:generation_tokens_total",
    "cached": "vllm:prefix_cache_hits_total",
    "preempted": "vllm:num_preemptions_total",
}


def read_counts(text: str) -> Counts | None:
    """The totals since the server started; None where one is missing."""
    found = {name: _value(text, metric) for name, metric in _METRICS.items()}
    if None in found.values():
        return None
    return Counts(**{name: int(value) for name, value in found.items()})


def running(text: str) -> int:
    """Requests that run or wait now; 0 where the server does not say."""
    return int((_value(text, "vllm:num_requests_running") or 0) + (_value(text, "vllm:num_requests_waiting") or 0))


def _value(text: str, metric: str) -> float | None:
    """A metric's value, summed over its labels."""
    rows = re.findall(rf"^{re.escape(metric)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, rows)) if rows else None
