"""`plan`: which layout to serve. Exit status 0 with an answer, 2 for a question that has none."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from helix_runtime.layout import LayoutError, resolve_layout
from helix_runtime.planner import show, words
from helix_runtime.planner.hardware import BYTES, PlannerError, known_gpus, load_gpu
from helix_runtime.planner.plan import DEFAULT_BATCH, DEFAULT_BLOCK, Plan, Question, plan
from helix_runtime.shapes import load_shape

USAGE = 2
#: Of any number asked: what comes of two of them still fits 64 bits.
MOST = 10**9
#: Where no terminal tells its width.
WIDTH = 190
EXAMPLES = """\
examples:
  ./test_helix.sh plan --model meta-llama/Llama-3.1-405B-Instruct --gpus 64 --hardware gb200 --context 1000000
  ./test_helix.sh plan --model deepseek-ai/DeepSeek-R1 --gpus 32 --hardware gb200 --context 1000000 --ttl-ms 20
  ./test_helix.sh plan --model nvidia/Llama-3.1-Nemotron-Nano-8B-v1 --gpus 8 --hardware h200 --context 131072 \\
      --tp 8 --dcp 2
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise PlannerError(f"{message}; all options: ./test_helix.sh plan --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Answer on stdout; a question that cannot be answered on stderr, with what is allowed."""
    try:
        options = make_parser().parse_args(argv)
        question = ask(options)
        found = plan(question)
        about = _about(found, options.tp, options.dcp)
    except PlannerError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return USAGE
    if options.format == "json":
        print(show.document(found, about).model_dump_json(indent=2))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)
        show.show(found, console, about)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="test_helix.sh plan",
        description="Every legal layout of a model on N GPUs: what fits, how fast, and whether Helix pays.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a hub id with a committed shape or in the hub's cache, or a folder or config.json",
    )
    parser.add_argument("--gpus", required=True, type=_whole, metavar="N", help="GPUs to use, at most")
    parser.add_argument("--hardware", required=True, help=", ".join(known_gpus()))
    parser.add_argument("--context", required=True, type=_whole, metavar="S", help="tokens of every request")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--batch", type=_whole, metavar="B", help=f"users at once over all GPUs (default {DEFAULT_BATCH})"
    )
    load.add_argument("--ttl-ms", type=_above_zero, metavar="T", help="most users whose tokens come every T ms")
    parser.add_argument("--dtype", choices=tuple(BYTES), default="bf16", help="of the weights (default bf16)")
    parser.add_argument("--kv-dtype", choices=tuple(BYTES), help="of the KV cache (default: as --dtype)")
    parser.add_argument(
        "--block-size", type=_whole, default=DEFAULT_BLOCK, metavar="N", help=f"default {DEFAULT_BLOCK}"
    )
    parser.add_argument("--backend", metavar="NAME", help="only this attention backend")
    parser.add_argument("--tp", type=_whole, metavar="N", help="with --dcp: say what this layout buys")
    parser.add_argument("--dcp", type=_whole, metavar="N", help="see --tp")
    parser.add_argument("--allow-gqa-tpa1", action="store_true", help="also TPA 1 for GQA models")
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="json: helix_runtime/planner/plan-v1.json"
    )
    return parser


def ask(options: argparse.Namespace) -> Question:
    """The question that the options mean. PlannerError where they mean none."""
    if (options.tp is None) != (options.dcp is None):
        raise PlannerError("--tp and --dcp go together, as in --tp 8 --dcp 2")
    gpu = load_gpu(options.hardware)
    try:
        shape = load_shape(options.model)
    except ValueError as error:
        raise PlannerError(f"--model: {error}") from None
    return Question(
        shape=shape,
        gpu=gpu,
        gpus=options.gpus,
        context=options.context,
        batch=options.batch,
        ttl_ms=options.ttl_ms,
        weights=options.dtype,
        kv=options.kv_dtype or options.dtype,
        block=options.block_size,
        backend=options.backend,
        allow_gqa_tpa1=options.allow_gqa_tpa1,
    )


def _about(found: Plan, tp: int | None, dcp: int | None) -> str | None:
    if tp is None or dcp is None:
        return None
    question = found.question
    try:
        return words.about(found, tp, dcp)
    except LookupError:
        if tp > question.gpus:
            raise PlannerError(f"--tp {tp} needs {tp} GPUs and --gpus is {question.gpus}; give --gpus {tp}") from None
    try:
        resolve_layout(
            tp,
            dcp,
            **question.shape.layout_arguments(),
            helix_mode=dcp > 1,
            hardware=question.gpu.family,
            attention_backend=question.backend,
            block_size=question.block,
            allow_gqa_tpa1=question.allow_gqa_tpa1,
        )
    except LayoutError as error:
        raise PlannerError(f"--tp {tp} --dcp {dcp}: {error}") from None
    raise AssertionError("a legal layout is missing from the plan")


def _whole(text: str) -> int:
    number = text.replace("_", "").replace(",", "")
    if not number.isdecimal() or not 1 <= int(number) <= MOST:
        raise argparse.ArgumentTypeError(f"'{text}'; allowed: a whole number from 1 to {MOST:,}")
    return int(number)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}'; allowed: a number above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
