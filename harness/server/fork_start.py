"""Start a Python program whose worker processes are forked, so that a server pays its imports once.

    python -m harness.server.fork_start MODULE [ARGUMENTS]

vLLM forks its engine and workers by default, but its CPU platform sets `VLLM_WORKER_MULTIPROC_METHOD=spawn`, and six
processes then import torch and vLLM one after the other on few cores. This keeps the variable at `fork`. Nothing of
vLLM is touched: not its attention, not its collectives, so a baseline started this way is still stock. With one OpenMP
thread (the harness sets OMP_NUM_THREADS=1) there is no thread pool that a fork could break.

Processes that wait for each other's messages sleep here where vLLM yields. Yielding is quick where each has a core;
where eight ranks share two, those that wait take most of the time of the one that works.
"""

import os
import runpy
import sys
import time

_KEPT = "VLLM_WORKER_MULTIPROC_METHOD"
#: Seconds that a waiting process of a CPU server sleeps before it looks again; a step takes tens of milliseconds.
NAP = 1e-4

#: What `vllm` runs. It may go back to `spawn`: where CUDA is initialised, a forked worker could not use it.
CUDA_MAIN = "vllm.entrypoints.cli.main"


class _Environment(type(os.environ)):
    """`os.environ` in which one variable cannot be changed."""

    def __setitem__(self, name: str, value: str) -> None:
        super().__setitem__(name, "fork" if name == _KEPT else value)


def run(words: list[str]) -> None:
    """Be `python -m MODULE ARGUMENTS`, of which `words` is the list."""
    if words[0] != CUDA_MAIN:
        os.environ.__class__ = _Environment
        os.sched_yield = lambda: time.sleep(NAP)
    os.environ[_KEPT] = "fork"
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run(sys.argv[1:])
