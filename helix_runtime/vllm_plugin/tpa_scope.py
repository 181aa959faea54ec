"""The TPA scope: while a model's attention is built, the tensor parallel group looks TPA ranks wide.

Why: stock vLLM shards attention heads TP ways. Helix shards them TPA = TP / KVP ways, so that the KVP ranks of a group
hold the same heads and different parts of the sequence. Linear layers and parameters remember the rank and size they
saw when built, so weight loading, `q_size`, `kv_size`, the KV-cache spec and the cache itself all follow.
Hook: `parallel_state.get_tp_group` answers with a view inside the scope; the model's attention class enters it;
`RowParallelLinear.__init__` leaves it, because `o_proj` stays sharded TP ways.
Upstream: none; the original Helix branch changed each model file.
Remove when: vLLM's attention layers take their own parallel group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from helix_runtime.vllm_plugin.compat import Surface, patch


@dataclass(frozen=True)
class TPAView:
    """What attention sees as its tensor parallel group. Size and rank only: a collective on it is an error."""

    world_size: int
    rank_in_group: int


_scope: ContextVar[TPAView | None] = ContextVar("helix_tpa_scope", default=None)


def in_tpa_scope() -> bool:
    return _scope.get() is not None


@contextmanager
def tpa_scope(view: TPAView | None) -> Iterator[None]:
    """Enter a scope (or, with None, leave the one around) for the duration of the block."""
    token = _scope.set(view)
    try:
        yield
    finally:
        _scope.reset(token)


def install(constructor: Surface, view: TPAView) -> None:
    """Patch this worker process so that `constructor` (an attention class's `__init__`) runs inside the scope."""
    patch("vllm.distributed.parallel_state:get_tp_group", _get_tp_group)
    patch("vllm.model_executor.layers.linear:RowParallelLinear.__init__", _leave)
    patch(constructor.target, lambda original: _enter(original, view))


def _get_tp_group(original):
    def get_tp_group():
        return _scope.get() or original()

    return get_tp_group


def _enter(original, view: TPAView):
    def __init__(self, *args, **kwargs):
        with tpa_scope(view):
            original(self, *args, **kwargs)

    return __init__


def _leave(original):
    def __init__(self, *args, **kwargs):
        with tpa_scope(None):
            original(self, *args, **kwargs)

    return __init__
