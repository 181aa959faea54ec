"""A captured CUDA graph, emulated on CPU tensors."""

import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = {torch.ops.aten.select.int, torch.ops.aten.slice.Tensor}


class RecordedGraph(TorchDispatchMode):
    """As a context: what changes a tensor is written down in `kernels` and runs with each `replay` only.

    Anything else but a view is refused, as a capture refuses an allocation or a copy from the host.
    """

    capturing: int | None = None  # the number of the capture that goes on
    _numbers = itertools.count(1)

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __enter__(self):
        RecordedGraph.capturing = next(self._numbers)
        return super().__enter__()

    def __exit__(self, *exception):
        RecordedGraph.capturing = None
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _VIEWS:
            return func(*args, **(kwargs or {}))
        assert func._schema.is_mutable and func is not torch.ops.aten.copy_.default, f"{func} in a capture"
        self.kernels.append((func, args, kwargs or {}))
        return args[0]

    def replay(self) -> None:
        for func, args, kwargs in self.kernels:
            func(*args, **kwargs)
