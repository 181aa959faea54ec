"""The plugin for stock vLLM: everything that touches vLLM, one file a hook.

`register` is the entry point in `vllm.general_plugins`; vLLM calls it once in every process. It installs pass-through
hooks only: two for the flag, two where the configuration is verified, one where a worker starts, and on CPU one where
the platform has its say. All others are patched in when a configuration asks for Helix, after every hooked signature
was probed.

Process by process: the API process reads the flag (`flag.py`), checks rules and refuses (`gate.py`); each worker
patches its own process (`worker.py`), builds the model in a TPA scope (`tpa_scope.py`), and proves its exchange
(`self_test.py`) before it serves.
"""

import logging

_registered = False


def register() -> None:
    """Install the pass-through hooks. Idempotent; vLLM may load plugins more than once in a process."""
    global _registered
    if _registered:
        return
    _registered = True

    from helix_runtime.vllm_plugin import cpu_platform, flag, gate, worker

    try:
        for door in (flag, gate, worker, cpu_platform):
            door.install()
    except (ImportError, AttributeError) as problem:
        # A vLLM whose doors have moved still serves, as if the plugin were not there: `--helix-mode` is then unknown.
        logging.getLogger("vllm.helix").error("Helix is not available on this vLLM, whose hooks moved: %s", problem)
