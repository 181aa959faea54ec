"""The declared table: attention backend x hardware x mode x vLLM version -> support, LSE and its base, reason, source.

The rows themselves are in `capability_rows`. No torch and no vLLM here: the table can be asked on any machine.
"""

import re
from functools import cache

from helix_runtime.capability_rows import (
    DEFAULT_VLLM,
    HARDWARE,
    HELIX_GQA,
    HELIX_MLA,
    MODES,
    NIGHTLY,
    ORIGINAL,
    ROWS,
    STANDARD_DCP,
    STANDARD_TP,
    SUPPORTED_VLLM,
    Declared,
    Row,
    Support,
    version_numbers,
)

__all__ = [
    "DEFAULT_VLLM",
    "HARDWARE",
    "HELIX_GQA",
    "HELIX_MLA",
    "MODES",
    "NIGHTLY",
    "ORIGINAL",
    "PLUGIN_ON_CUDA",
    "ROWS",
    "STANDARD_DCP",
    "STANDARD_TP",
    "SUPPORTED_VLLM",
    "Declared",
    "Row",
    "Support",
    "backends",
    "check_version",
    "declare",
    "default_backend",
    "families_of",
    "hardware_family",
    "is_mla",
    "plugin_refusal_on_cuda",
]

#: What a version picks when no --attention-backend is given: (version, MLA, hardware) -> names, tried in this order.
#: 0.32.0: platforms/cuda.py `_get_backend_priorities`, platforms/cpu.py `get_attn_backend_cls`, and our CPU graft.
#: CPU_MLA stands for MLA on a CPU without AMX tiles; vLLM takes AMX_MLA where it finds them.
_GQA_ORDER = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
_PRIORITIES: dict[tuple[str, bool, str], tuple[str, ...]] = {
    **{("0.32.0", False, family): _GQA_ORDER for family in HARDWARE if family != "cpu"},
    ("0.32.0", False, "blackwell"): ("FLASHINFER", "FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION"),
    **{
        ("0.32.0", True, family): ("FLASH_ATTN_MLA", "FLASHMLA", "FLASHINFER_MLA", "TRITON_MLA")
        for family in ("ampere", "ada", "hopper")
    },
    ("0.32.0", True, "blackwell"): ("FLASHINFER_MLA", "CUTLASS_MLA", "FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA"),
    ("0.32.0", True, "blackwell-rtx"): ("TRITON_MLA",),
    ("0.32.0", False, "cpu"): ("CPU_ATTN", "HELIX_CPU"),
    ("0.32.0", True, "cpu"): ("CPU_MLA", "HELIX_CPU_MLA"),
    (ORIGINAL, True, "blackwell"): ("CUTLASS_MLA",),  # published: Blackwell with DCP selects it
}


#: Backends that the plugin lets run with context parallelism on CUDA, by kind of model; it refuses all others.
PLUGIN_ON_CUDA = {"GQA": ("FLASH_ATTN", "FLASHINFER"), "MLA": ("FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA")}
#: Those that cells have judged inside vLLM's CUDA graphs on four GPUs, and the modes (reports/2026-11-26-h200-x4;
#: FLASHINFER in reports/2026-11-26-h200-x4-second).
IN_CUDA_GRAPHS = ("FLASH_ATTN", "FLASHINFER", "FLASH_ATTN_MLA", "FLASHMLA")
GRAPH_MODES = ("PIECEWISE", "FULL_AND_PIECEWISE", "FULL")


def plugin_refusal_on_cuda(
    backend: str | None,
    use_mla: bool,
    eager: bool,
    unproved_cuda_graphs: bool = False,
    graph_mode: str | None = None,
) -> str | None:
    """Why the plugin refuses Helix on CUDA with this backend (None: vLLM's choice) so far, or None.

    `unproved_cuda_graphs`: the Helix option that lets CUDA graphs be tried. `graph_mode`: vLLM's name of the mode that
    is asked for; None for its default, FULL_AND_PIECEWISE.
    """
    kind = "MLA" if use_mla else "GQA"
    if backend not in PLUGIN_ON_CUDA[kind]:
        asked = "the backend that vLLM would choose" if backend is None else backend
        allowed = ", ".join(f"--attention-backend {name}" for name in PLUGIN_ON_CUDA[kind])
        return f"no cell has proved Helix for {kind} models with {asked} on CUDA; allowed: {allowed}"
    if eager or unproved_cuda_graphs or graph_mode == "NONE":
        return None
    validate = "(or, to validate it, the helix option unproved_cuda_graphs: docs/hooks/cuda-graphs.md)"
    if backend not in IN_CUDA_GRAPHS:
        proved = ", ".join(name for name in PLUGIN_ON_CUDA[kind] if name in IN_CUDA_GRAPHS)
        return (
            f"no cell has proved Helix with {backend} inside CUDA graphs on four GPUs; add --enforce-eager, or take "
            f"--attention-backend {proved} {validate}"
        )
    if graph_mode not in (None, *GRAPH_MODES):
        return (
            f"no cell has proved Helix in CUDA graphs of mode {graph_mode}; allowed: {', '.join(GRAPH_MODES)}; add "
            f"--enforce-eager {validate}"
        )
    return None


class UnknownName(ValueError):
    """A name, or a release, that the table does not have; the text says which it has."""


@cache
def declare(backend: str, hardware: str, mode: str, vllm_version: str = DEFAULT_VLLM) -> Declared:
    """What the table says of one square.

    Raises UnknownName for a backend, hardware family, mode or version that the table does not know, with the valid
    ones. A square that `helix-original` does not print is `unsupported`, with that reason.
    """
    version = check_version(vllm_version)
    _known("hardware family", hardware, tuple(HARDWARE))
    _known("mode", mode, MODES)
    _known("attention backend", backend, backends(vllm_version=version))
    for row in ROWS:
        if (row.backend, row.hardware, row.mode) == (backend, hardware, mode) and row.covers(version):
            return row.declared
    silent = f"{backend} on {hardware} in {mode} is not in the table of {version}"
    return Declared(Support.UNSUPPORTED, silent, "helix_runtime/capabilities.py", False, None)


@cache
def backends(
    hardware: str | None = None, *, mla: bool | None = None, vllm_version: str = DEFAULT_VLLM
) -> tuple[str, ...]:
    """Backends of that version in table order; with `hardware`, those that serve at least one mode on it."""
    version = check_version(vllm_version)
    if hardware is not None:
        _known("hardware family", hardware, tuple(HARDWARE))
    names = dict.fromkeys(
        row.backend
        for row in ROWS
        if row.covers(version)
        and mla in (None, row.mla)
        and (hardware is None or (row.hardware == hardware and row.declared.support is not Support.UNSUPPORTED))
    )
    return tuple(names)


@cache
def families_of(backend: str, vllm_version: str = DEFAULT_VLLM) -> tuple[str, ...]:
    """Hardware families on which that version's source lets the backend run at all, whatever the mode."""
    version = check_version(vllm_version)
    found = {row.hardware for row in ROWS if row.backend == backend and row.covers(version) and row.runs}
    return tuple(family for family in HARDWARE if family in found)


def is_mla(backend: str, vllm_version: str = DEFAULT_VLLM) -> bool:
    """Whether a backend serves MLA models (else GQA). ValueError for an unknown one."""
    _known("attention backend", backend, backends(vllm_version=vllm_version))
    return backend in backends(mla=True, vllm_version=vllm_version)


@cache
def default_backend(
    hardware: str, mode: str, vllm_version: str = DEFAULT_VLLM, *, use_mla: bool | None = None
) -> str | None:
    """The backend that runs when the user names none: the first in that version's order that is not unsupported.

    `use_mla` is needed to tell MLA from GQA in the two standard modes (False when left out). None: no backend does it,
    or the version does not say. The first may be a known limitation: that is what vLLM would pick.
    """
    version = check_version(vllm_version)
    _known("hardware family", hardware, tuple(HARDWARE))
    _known("mode", mode, MODES)
    mla = mode == HELIX_MLA if mode in (HELIX_GQA, HELIX_MLA) else bool(use_mla)
    if version == ORIGINAL and mode == STANDARD_TP:
        return None  # its one published choice is about DCP
    order = _PRIORITIES.get((version, mla, hardware), ())
    return next(
        (name for name in order if declare(name, hardware, mode, version).support is not Support.UNSUPPORTED), None
    )


def hardware_family(major: int, minor: int) -> str:
    """The family of a CUDA compute capability. ValueError where the table has none (below 8.0, 11.x, 13 and up)."""
    if major == 8:
        return "ada" if minor == 9 else "ampere"
    families = {9: "hopper", 10: "blackwell", 12: "blackwell-rtx"}
    if major not in families:
        known = ", ".join(f"{name} ({span})" for name, span in HARDWARE.items() if span)
        raise ValueError(f"compute capability {major}.{minor} is in no family of the table; known: {known}")
    return families[major]


@cache
def check_version(version: str) -> str:
    """`version` without a local suffix (`0.32.0+cpu` -> `0.32.0`). ValueError if no row of the table covers it."""
    plain = version.split("+")[0]
    if not any(row.covers(plain) for row in ROWS if row.before is None or _VERSION.fullmatch(plain)):
        spans = dict.fromkeys(row.since if row.before is None else f"{row.since} <= v < {row.before}" for row in ROWS)
        raise UnknownName(f"the table has no rows for vLLM {version!r}; it covers: {', '.join(spans)}")
    return plain if plain in (ORIGINAL, NIGHTLY) else ".".join(map(str, version_numbers(plain)))


_VERSION = re.compile(r"\d+(\.\d+)*")


def _known(what: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UnknownName(f"unknown {what} {value!r}; valid: {', '.join(valid)}")
