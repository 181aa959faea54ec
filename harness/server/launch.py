"""What is started for a cell: its command with what the harness adds, and a clean environment."""

import json
import os
import re
import secrets
import sys
from pathlib import Path

from harness.cell import Cell, Mode, python
from harness.frozen import Frozen
from harness.models.recipe import PREFIX, ensure_apart
from harness.redact import is_secret
from harness.server.fork_start import CUDA_MAIN

FORCED_DECODE = "helix_runtime.vllm_plugin.forced_decode:ForcedDecode"
FORCED_DECODE_V2 = "helix_runtime.vllm_plugin.forced_decode_v2:ForcedDecodeV2"
_V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
#: A proxy may take a password, and a server may have to fetch its model through it.
_PROXY = re.compile(r"^https?_proxy$", re.IGNORECASE)
_HUB_TOKEN = "HF_TOKEN"
_NOISE = ("PYTEST_CURRENT_TEST",)  # differs from test to test, which would make a warm process for each


FORK_START = (python(), "-m", "harness.server.fork_start")


class Launch(Frozen):
    """One server to start. `name` is a nonce that /v1/models must show, `api_key` is this server's alone."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    name: str
    api_key: str
    port: int
    model: str
    proof_dir: Path | None = None
    guard: tuple[str, ...] = ("harness.server.guard",)  # module and options of what starts it, and ends it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def forked(self) -> tuple[str, ...]:
        """The module and its arguments, where a warm process may fork this server (`warm.py`); else ()."""
        here = self.guard == ("harness.server.guard",)
        return self.argv[len(FORK_START) :] if here and self.argv[: len(FORK_START)] == FORK_START else ()


def make_launch(cell: Cell, folder: Path, port: int) -> Launch:
    """The launch of `cell`; a recipe's model is made now if it is missing. `folder` is the cell's own, absolute."""
    recipe = cell.model.startswith(PREFIX)
    model = str(ensure_apart(cell.model)) if recipe else cell.model
    name, api_key = f"helix-{secrets.token_hex(8)}", secrets.token_hex(16)
    proof_dir = None if cell.stock else folder / "proof"
    argv, given = _take_additional_config(cell.command(model))
    argv += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    if not cell.stock:
        argv += ["--logits-processors", forced_decode(cell)]
        if cell.mode.helix or cell.mode is Mode.STANDARD_DCP:  # stock DCP is counted, and proves its path
            helix = {**dict(cell.helix), "proof_dir": str(proof_dir)}
            given["helix"] = {**given.get("helix", {}), **helix, **({"fault": cell.fault} if cell.fault else {})}
    if given:
        argv += ["--additional-config", json.dumps(given)]
    if cell.hardware != "cpu" and dict(cell.serve).get("enforce-eager") is True:
        argv += _without_fusion(argv)
    if cell.hardware == "cpu" or warm_gpus():
        argv = _forked(argv)
    env = environment(cell, api_key, offline=recipe)
    return Launch(
        argv=tuple(argv),
        env=tuple(sorted(env.items())),
        name=name,
        api_key=api_key,
        port=port,
        model=model,
        proof_dir=proof_dir,
    )


def forced_decode(cell: Cell) -> str:
    """The processor that the server's model runner takes; the wrong one is refused at start, by name.

    vLLM takes its V2 runner on GPUs, and V1 on CPU, where V2's Triton kernels do not run, unless the environment says
    which. For a few features that V2 lacks vLLM goes back to V1 by itself: such a cell sets the variable to 0.
    """
    asked = {**os.environ, **dict(cell.env)}.get(_V2_RUNNER, "")
    v2 = asked != "0" if asked else cell.hardware != "cpu"
    return FORCED_DECODE_V2 if v2 else FORCED_DECODE


def environment(cell: Cell, api_key: str, offline: bool) -> dict[str, str]:
    """This process's environment without secrets, with the `helix` of this interpreter first on PATH."""
    env = {name: value for name, value in os.environ.items() if name not in _NOISE and not is_secret(name, value)}
    if not offline:
        kept = (name for name in os.environ if name == _HUB_TOKEN or _PROXY.match(name))
        env |= {name: os.environ[name] for name in kept}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    env |= {"VLLM_API_KEY": api_key, "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    if cell.hardware == "cpu":
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        if dict(cell.serve).get("enforce-eager") is True:
            # vLLM compiles a few helpers (vocabulary masks, ranks of logprobs) even then: 10 s of C++ a rank.
            env["TORCHDYNAMO_DISABLE"] = "1"
    else:
        env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # compiles for minutes at first use; we decode greedily
        # Workers forked from what has imported vLLM, as `LLM(…)` does; `vllm serve` spawns, and imports three times in
        # a row. vLLM goes back to spawn by itself where CUDA is initialised already.
        env["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    if cell.stock and not cell.helix:
        env["VLLM_PLUGINS"] = ""  # not even loaded
    return env | dict(cell.env)


def _without_fusion(argv: list[str]) -> list[str]:
    """What an eager server is told beside `argv`: nothing is compiled there, so no pass can fuse anything.

    vLLM asks the fusion of all-reduce and norm for its largest size all the same. That imports FlashInfer, which
    initialises CUDA before there are workers, and these could not be forked then (0.32, `_set_compile_ranges`).
    """
    if any(word.startswith(("--compilation-config", "-cc")) for word in argv):
        return []
    return ["--compilation-config", json.dumps({"pass_config": {"fuse_allreduce_rms": False}})]


def warm_gpus() -> bool:
    """Whether GPU servers too are forked from a process that has imported vLLM: `HELIX_WARM=all`, untried on a GPU."""
    return os.environ.get("HELIX_WARM") == "all"


def _forked(argv: list[str]) -> list[str]:
    """The same server with forked workers: imports are paid once, not once a rank (`fork_start.py`)."""
    module = {"helix": ["helix_runtime.serve", *argv[1:]], "vllm": [CUDA_MAIN, *argv[1:]]}.get(argv[0], argv[2:])
    return [*FORK_START, *module]


def _take_additional_config(argv: list[str]) -> tuple[list[str], dict]:
    """`argv` without its `--additional-config`, and what that held, so that ours can be merged into it."""
    if "--additional-config" not in argv:
        return argv, {}
    at = argv.index("--additional-config")
    return [*argv[:at], *argv[at + 2 :]], json.loads(argv[at + 1])
