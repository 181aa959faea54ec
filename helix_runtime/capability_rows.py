"""The rows of the declared table, one list a generation; `capabilities` is the door to ask them.

Two generations stand side by side. `helix-original` is the table that the original design published, kept as it was.
The rows of a vLLM version are what that version's source declares (read in the wheel, not run); what a run showed is
the harness's business, and the report draws both. No torch and no vLLM here: the table can be asked on any machine.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product

#: vLLM versions that the plugin runs on.
SUPPORTED_VLLM = ("0.32.0",)
DEFAULT_VLLM = SUPPORTED_VLLM[-1]

#: The version name under which the original design's published table is kept.
ORIGINAL = "helix-original"

#: The version name of a development build: what stands between the last release and the next one.
NIGHTLY = "nightly"

MODES = ("standard-tp", "standard-dcp", "helix-gqa", "helix-mla")
STANDARD_TP, STANDARD_DCP, HELIX_GQA, HELIX_MLA = MODES

#: Hardware family -> the CUDA compute capabilities that it covers; `None` is a host without a GPU.
HARDWARE = {
    "ampere": "8.0-8.8",
    "ada": "8.9",
    "hopper": "9.x",
    "blackwell": "10.x",
    "blackwell-rtx": "12.x",
    "cpu": None,
}


class Support(StrEnum):
    SUPPORTED = "supported"
    KNOWN_LIMITATION = "known-limitation"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class Declared:
    """One answer of the table.

    `lse`: the backend's decode returns the softmax log-sum-exp. `lse_base`: the base in which its kernel returns it,
    `e` or `2`; None where it returns none, or where the source does not say. `source`: where the claim was read;
    paths are relative to the `vllm` package of that version.
    """

    support: Support
    reason: str
    source: str
    lse: bool
    lse_base: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """One row. Covers versions `since <= v < before`, or the one named version when `before` is None."""

    backend: str
    hardware: str
    mode: str
    mla: bool  # an MLA backend; otherwise GQA (and MHA, MQA)
    since: str
    before: str | None
    declared: Declared
    runs: bool = True  # the backend runs on this hardware at all, whatever the mode

    def covers(self, version: str) -> bool:
        if self.before is None or version in (ORIGINAL, NIGHTLY):
            return version == self.since
        return version_numbers(self.since) <= version_numbers(version) < version_numbers(self.before)


def version_numbers(version: str) -> tuple[int, ...]:
    """`0.32` -> (0, 32, 0). ValueError where a part is no number."""
    numbers = [int(part) for part in version.split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))


@dataclass(frozen=True, slots=True)
class _Backend:
    """What one backend's source declares, before it is spread over hardware and modes."""

    name: str
    mla: bool
    families: tuple[str, ...]
    file: str  # of its class, below v1/attention/backends/
    families_why: str  # why exactly these families, as the source has it
    lse_base: str | None  # None: its decode returns no LSE
    # Modes that differ from what LSE and families alone would give: mode -> (support, reason, source or None).
    special: tuple[tuple[str, Support, str, str | None], ...] = ()


_CUDA = ("ampere", "ada", "hopper", "blackwell", "blackwell-rtx")
_LIMIT, _NO = Support.KNOWN_LIMITATION, Support.UNSUPPORTED

#: What the source of vLLM 0.32.0 declares, one entry a backend; the two HELIX_ backends are this project's own.
_VLLM_0_32 = (
    _Backend("FLASH_ATTN", False, _CUDA, "flash_attn.py", "compute capability 8.0 and up", "e"),
    _Backend(
        "FLASHINFER",
        False,
        _CUDA,
        "flashinfer.py",
        "compute capability 8.0 to 12.1",
        # `FlashInferImpl` inherits lse_base_on_e = True, but its GQA kernels return base 2: its call sites say so.
        "2",
    ),
    _Backend("TRITON_ATTN", False, _CUDA, "triton_attn.py", "a GPU", None),
    _Backend("FLEX_ATTENTION", False, _CUDA, "flex_attention.py", "a GPU", None),
    _Backend("FLASH_ATTN_MLA", True, ("hopper",), "mla/flashattn_mla.py", "compute capability 9.x only", "e"),
    _Backend(
        "FLASHMLA",
        True,
        ("hopper",),
        "mla/flashmla.py",
        "compute capability 9.x: its class lists 9.x and 10.x, but its dense kernel is for Hopper only "
        "(v1/attention/ops/flashmla.py: is_flashmla_dense_supported)",
        "e",
    ),
    _Backend("CUTLASS_MLA", True, ("blackwell",), "mla/cutlass_mla.py", "compute capability 10.x only", "e"),
    _Backend("FLASHINFER_MLA", True, ("blackwell",), "mla/flashinfer_mla.py", "compute capability 10.x only", "e"),
    _Backend("TRITON_MLA", True, _CUDA, "mla/triton_mla.py", "a GPU (any: the only dense MLA backend on 12.x)", "e"),
    _Backend(
        "TOKENSPEED_MLA",
        True,
        ("blackwell",),
        "mla/tokenspeed_mla.py",
        "compute capability 10.x only, DeepSeek-R1's MLA sizes, fp8 KV cache",
        "2",
        special=((HELIX_MLA, _NO, "needs an fp8 KV cache, which no cell has proved with Helix", None),),
    ),
    _Backend("CPU_ATTN", False, ("cpu",), "cpu_attn.py", "a host without a GPU", None),
    _Backend("CPU_MLA", True, ("cpu",), "mla/cpu_mla.py", "a host without a GPU", None),
    _Backend("AMX_MLA", True, ("cpu",), "mla/amx_mla.py", "a CPU with AMX tiles", None),
)
_OURS_0_32 = (
    _Backend(
        "HELIX_CPU",
        False,
        ("cpu",),
        "helix_runtime/vllm_plugin",
        "a host without a GPU",
        "e",
        special=((STANDARD_TP, _NO, "the standard-TP baseline runs on stock CPU_ATTN, without a hook of ours", None),),
    ),
    _Backend(
        "HELIX_CPU_MLA",
        True,
        ("cpu",),
        "helix_runtime/vllm_plugin",
        "a host without a GPU",
        "e",
        special=((STANDARD_TP, _NO, "the standard-TP baseline runs on stock CPU_MLA, without a hook of ours", None),),
    ),
)  # fmt: skip


def _spread(backend: _Backend, folder: str, since: str, before: str | None) -> list[Row]:
    """One row for each hardware family and mode of a backend."""
    return [
        Row(
            backend.name,
            hardware,
            mode,
            backend.mla,
            since,
            before,
            _judge(backend, hardware, mode, folder),
            runs=hardware in backend.families,
        )
        for hardware, mode in product(HARDWARE, MODES)
    ]


def _judge(backend: _Backend, hardware: str, mode: str, folder: str) -> Declared:
    lse, base, source = backend.lse_base is not None, backend.lse_base, folder + backend.file

    def answer(support: Support, reason: str, where: str | None = None) -> Declared:
        return Declared(support, reason, where or source, lse, base)

    if hardware not in backend.families:
        said = backend.families_why.startswith("compute capability")
        where = f"{source}: supports_compute_capability" if said else None
        return answer(_NO, f"{backend.name} does not run on {hardware}; it needs {backend.families_why}", where)
    if mode in (HELIX_GQA, HELIX_MLA) and backend.mla != (mode == HELIX_MLA):
        serves, wants = ("MLA", "GQA") if backend.mla else ("GQA", "MLA")
        return answer(_NO, f"{backend.name} serves {serves} models; {mode} is for {wants} models")
    if mode != STANDARD_TP and not lse:
        return answer(_NO, f"{backend.name} returns no LSE for decode, so partial results cannot be merged (no DCP)")
    if mode in (HELIX_GQA, HELIX_MLA) and hardware in ("ampere", "ada"):
        return answer(_NO, "Helix is declared for compute capability 9.0 and up: no cell has proved it below")
    for special_mode, support, reason, where in backend.special:
        if mode == special_mode:
            return answer(support, reason, where)
    if mode == STANDARD_TP:
        return answer(Support.SUPPORTED, f"needs no LSE; it needs {backend.families_why}")
    return answer(Support.SUPPORTED, f"supports_dcp, and decode returns its LSE in base {base}")


def _original() -> list[Row]:
    """The original design's published table: per backend and hardware, standard TP / standard DCP / Helix."""
    source = "the original Helix branch's published table"
    tick, cross = Support.SUPPORTED, Support.UNSUPPORTED
    root_cause = "known limitation as published: wrong answers with Helix GQA, root cause under investigation"
    datacenter = ("hopper", "blackwell")
    table = (  # backend, mla, hardware, (standard TP, standard DCP, Helix), lse, base, reason
        ("FLASH_ATTN", False, datacenter, (tick, tick, tick), True, "e", "published as working"),
        ("FLASHINFER", False, datacenter, (tick, tick, _LIMIT), True, "2", "published as working"),
        ("FLASHMLA", True, ("hopper",), (tick, tick, tick), True, None, "published as working on Hopper"),
        ("FLASHMLA", True, ("blackwell",), (cross, cross, cross), True, None, "published as not for Blackwell"),
        ("CUTLASS_MLA", True, datacenter, (tick, tick, tick), True, None, "published as working on both"),
        ("FLASHINFER_MLA", True, datacenter, (tick, cross, cross), False, None, "published: no LSE, so no DCP"),
    )
    rows = []
    for name, mla, families, supports, lse, base, reason in table:
        modes = (STANDARD_TP, STANDARD_DCP, HELIX_MLA if mla else HELIX_GQA)
        for hardware, (mode, support) in product(families, zip(modes, supports, strict=True)):
            why = root_cause if support is _LIMIT else reason
            rows.append(Row(name, hardware, mode, mla, ORIGINAL, None, Declared(support, why, source, lse, base)))
    return rows


def _flashinfer_before_0_32() -> list[Row]:
    """Upstream defects that explain the original table's FLASHINFER column; gone in the versions that we support."""
    source = "vllm-project/vllm issues 48003 and 52796"
    broken = Declared(
        _LIMIT,
        "decode context parallelism reads foreign pages and wrong local lengths before 0.30.0, and before 0.29.0 "
        "merges a base-2 LSE as base e on a prefix hit or a second chunk",
        source,
        True,
        "2",
    )
    mended = Declared(
        Support.SUPPORTED, "the defects of decode context parallelism are gone from 0.30.0", source, True, "2"
    )
    stock = Declared(Support.SUPPORTED, "needs no LSE; the defects are of context parallelism only", source, True, "2")
    spans = (
        (STANDARD_DCP, "0.15.0", "0.30.0", broken),
        (STANDARD_DCP, "0.30.0", "0.32.0", mended),
        (STANDARD_TP, "0.15.0", "0.32.0", stock),
    )
    return [
        Row("FLASHINFER", family, mode, False, since, before, declared)
        for family in _CUDA
        for mode, since, before, declared in spans
    ]


def _cutlass_mla_before_0_32() -> list[Row]:
    """What `suites/version-sweep.yaml` starts with FlashInfer's MLA prefill, whose defect is none of this backend."""
    declared = Declared(
        Support.SUPPORTED,
        "needs no LSE; compute capability 10.x only",
        "v1/attention/backends/mla/cutlass_mla.py",
        True,
        "e",
    )
    return [Row("CUTLASS_MLA", "blackwell", STANDARD_TP, True, "0.28.0", "0.32.0", declared)]


def _nightly() -> list[Row]:
    """Standard modes of a development build, as the last release declares them: nobody has read that source yet."""
    rows = (row for item in _VLLM_0_32 for row in _spread(item, "v1/attention/backends/", NIGHTLY, None))
    return [
        replace(row, declared=replace(row.declared, reason=f"as in vLLM {DEFAULT_VLLM}: {row.declared.reason}"))
        for row in rows
        if row.mode in (STANDARD_TP, STANDARD_DCP)
    ]


#: Every row of the table.
ROWS: tuple[Row, ...] = (
    *_original(),
    *_flashinfer_before_0_32(),
    *_cutlass_mla_before_0_32(),
    *_nightly(),
    *(row for item in _VLLM_0_32 for row in _spread(item, "v1/attention/backends/", "0.32.0", "0.32.1")),
    *(row for item in _OURS_0_32 for row in _spread(item, "", "0.32.0", "0.32.1")),
)
