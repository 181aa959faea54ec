"""`additional_config={"helix": {...}}`: the plugin's options, read strictly."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from helix_runtime.vllm_plugin.refusal import HelixRefusal

#: Values of `helix.combine`. `auto`: ours in torch on CPU; on CUDA ours or upstream's, by backend (`exchange.py`).
COMBINE_OPTIONS = ("auto", "upstream", "torch", "triton", "direct")


@dataclass(frozen=True)
class HelixOptions:
    """What a server was asked for. The presence of the key `helix` is what switches the plugin on.

    helix_mode: Helix parallelism (what `--helix-mode` sets). False with the key present: standard DCP, with our
        LSE-returning CPU backend where vLLM has none, and with the proof of path.
    allow_gqa_tpa1: permit TPA = 1 for a model with several KV heads.
    share_gpu: all ranks on one GPU, for validation on a machine that has one (`share_gpu.py`).
    unproved_cuda_graphs: let Helix run inside CUDA graphs that no cell has proved: for validation (`cuda_graphs.py`).
    proof_dir: folder for each worker's proof of path; None writes none.
    combine: which implementation of the `a2a` combine runs: `auto`, `upstream` (vLLM's own), or ours: `torch`,
        `triton`, `direct` (`exchange.py`).
    overlap: micro-batches into which a decode batch is cut, so that the exchange of one runs under the attention of
        the next (HOP-B); 1 is off. For GQA on our CPU backend; refused elsewhere.
    capture: compare every merged attention with fp64 and write the first that differs into proof_dir (`capture.py`).
    fault: name of a deliberate defect (`faults.py`), for the oracle's own test.
    """

    helix_mode: bool = False
    allow_gqa_tpa1: bool = False
    share_gpu: bool = False
    unproved_cuda_graphs: bool = False
    proof_dir: str | None = None
    capture: bool = False
    fault: str | None = None
    combine: str = "auto"
    overlap: int = 1


def helix_options(additional_config: object) -> HelixOptions | None:
    """The options in vLLM's `additional_config`, or None where Helix was not asked for. Raises HelixRefusal."""
    if not isinstance(additional_config, Mapping) or "helix" not in additional_config:
        return None
    given = additional_config["helix"]
    if not isinstance(given, Mapping):
        raise HelixRefusal(f'additional_config["helix"] must be a mapping of options, not {given!r}; {_allowed()}')
    options = HelixOptions(**{name: _checked(name, value) for name, value in given.items()})
    if options.combine not in COMBINE_OPTIONS:
        raise HelixRefusal(
            f'additional_config["helix"]["combine"] is {options.combine!r}; allowed: {", ".join(COMBINE_OPTIONS)}'
        )
    if options.overlap < 1 or isinstance(options.overlap, bool):
        raise HelixRefusal(f'additional_config["helix"]["overlap"] is {options.overlap!r}; allowed: 1 (off) or more')
    return options


def _checked(name: str, value: Any) -> Any:
    types = {field.name: field.type for field in fields(HelixOptions)}
    if name not in types:
        raise HelixRefusal(f'additional_config["helix"] has no option {name!r}; {_allowed()}')
    allowed = get_args(types[name]) or (types[name],)
    if not isinstance(value, allowed):
        raise HelixRefusal(f'additional_config["helix"][{name!r}] is {value!r}; {_allowed()}')
    return value


def _allowed() -> str:
    names = (f"{field.name} ({getattr(field.type, '__name__', field.type)})" for field in fields(HelixOptions))
    return "allowed: " + ", ".join(names)
