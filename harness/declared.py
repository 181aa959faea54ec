"""The declared verdict of a cell: what the suite says, else what the layout rules and the capability table say."""

from functools import cache
from typing import NamedTuple

from harness.cell import CUDA_GRAPHS, Cell
from harness.verdict import Verdict


class Declaration(NamedTuple):
    """`why` is the rule or the row it comes from; `refusal` is text that the documented refusal contains."""

    verdict: Verdict
    why: str
    refusal: str | None = None


class Rules(NamedTuple):
    """The inputs on which layout rules and capability table depend; cells that share them are judged once."""

    mode: str
    backend: str
    hardware: str
    model: str
    tp: int
    kvp: int
    interleave: int
    block_size: int | None
    allow_gqa_tpa1: bool
    eager: bool
    unproved_cuda_graphs: bool
    graph_mode: str | None
    vllm_version: str


def declare(cell: Cell, refusal: str | None = None) -> Declaration:
    """The verdict declared for `cell`. `expect` in the suite wins over the rules."""
    if cell.expect is not None:
        return Declaration(cell.expect, cell.why or "as the suite says", refusal)
    if cell.fault is not None:
        return Declaration(Verdict.FAIL, f"{cell.fault} is a deliberate defect: the oracle must catch it", refusal)
    options = dict(cell.serve)
    block_size = options.get("block-size")
    found = judge(
        Rules(
            mode=cell.mode,
            backend=cell.backend,
            hardware=cell.hardware,
            model=cell.model,
            tp=cell.tp,
            kvp=cell.kvp,
            interleave=cell.interleave,
            block_size=int(block_size) if block_size is not None else None,
            allow_gqa_tpa1=dict(cell.helix).get("allow_gqa_tpa1") is True,
            eager=options.get("enforce-eager") is True,
            unproved_cuda_graphs=dict(cell.helix).get("unproved_cuda_graphs") is True,
            graph_mode=options.get(CUDA_GRAPHS),
            vllm_version=cell.vllm_version,
        )
    )
    return found._replace(refusal=refusal) if refusal else found


@cache
def judge(rules: Rules) -> Declaration:
    """Layout first (an illegal one is refused wherever it runs), then the table. A refusal is quoted by its rule."""
    from helix_runtime.layout import LayoutError

    note = ""
    try:
        mla = _check_layout(rules)
    except LayoutError as error:
        return Declaration(Verdict.REJECTED, str(error), error.sentence)
    except LookupError as error:
        mla, note = None, f"; layout not checked: {error.args[0] if error.args else error}"
    declaration = _from_table(rules, mla)
    return declaration._replace(why=declaration.why + note)


#: Group sizes of vLLM's shared-memory collectives on CPU; it ends with "Invalid world size" on any other.
CPU_RANKS = (1, 2, 3, 4, 8)


def comparable_tp(model: str, tp: int, hardware: str) -> int:
    """TP of the baseline of a cell on `tp` ranks: the same, or the largest below it that standard TP can run."""
    return next(size for size in range(tp, 0, -1) if size == 1 or not standard_tp_problem(model, size, hardware))


@cache
def standard_tp_problem(model: str, tp: int, hardware: str) -> str | None:
    """Why stock vLLM cannot run `model` on `tp` ranks of standard TP, or None."""
    from helix_runtime.layout import LayoutError, resolve_layout

    if hardware == "cpu" and tp not in CPU_RANKS:
        return f"vLLM's CPU collectives take groups of {', '.join(map(str, CPU_RANKS[1:]))} ranks, not {tp}"
    try:
        resolve_layout(tp, 1, **shape_of(model).layout_arguments(), helix_mode=False)
    except LayoutError as error:
        return error.sentence
    except LookupError:
        return None
    return None


def shape_of(model: str):
    """The ModelShape of a recipe or of a committed `config.json`. Raises LookupError for a model without either."""
    if model.startswith("recipe:"):
        from harness.models import shape

        return shape(model)
    from helix_runtime.shapes import known_shapes, load_shape

    if model not in known_shapes():
        raise LookupError(f"no committed shape of {model}")
    return load_shape(model)


def _check_layout(rules: Rules) -> bool:
    """Raises LayoutError, or LookupError for an unknown model; returns whether the model is MLA."""
    from helix_runtime.layout import resolve_layout

    shape = shape_of(rules.model)
    if rules.mode != "standard-tp":
        helix = rules.mode.startswith("helix")
        on_gpu = helix and rules.hardware != "cpu"  # where the gate asks what the backend runs on
        resolve_layout(
            tensor_parallel_size=rules.tp,
            decode_context_parallel_size=rules.kvp,
            **shape.layout_arguments(),
            helix_mode=helix,
            attention_backend=rules.backend if on_gpu and rules.backend != "auto" else None,
            hardware=rules.hardware if on_gpu else None,
            interleave_size=rules.interleave,
            block_size=rules.block_size,
            allow_gqa_tpa1=rules.allow_gqa_tpa1,
            vllm_version=rules.vllm_version,
        )
    return shape.use_mla


def _from_table(rules: Rules, mla: bool | None) -> Declaration:
    from helix_runtime import capabilities
    from helix_runtime.capabilities import Support

    backend, prefix = rules.backend, ""
    if backend == "auto":
        backend = capabilities.default_backend(rules.hardware, rules.mode, rules.vllm_version, use_mla=mla)
        if backend is None:
            return Declaration(Verdict.REJECTED, f"no backend serves {rules.mode} on {rules.hardware}")
        prefix = f"auto is {backend}: "
    if rules.mode.startswith("helix") and rules.hardware != "cpu":
        asked = None if rules.backend == "auto" else rules.backend
        if refused := capabilities.plugin_refusal_on_cuda(
            asked, bool(mla), rules.eager, rules.unproved_cuda_graphs, rules.graph_mode
        ):
            return Declaration(Verdict.REJECTED, f"the plugin so far: {refused}", refused)
    row = capabilities.declare(backend, rules.hardware, rules.mode, rules.vllm_version)
    verdict = {
        Support.SUPPORTED: Verdict.PASS,
        Support.KNOWN_LIMITATION: Verdict.XFAIL,
        Support.UNSUPPORTED: Verdict.REJECTED,
    }[row.support]
    return Declaration(verdict, f"{prefix}{row.reason} ({row.source})")
