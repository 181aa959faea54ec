"""`vllm bench serve` as a process that stays: its imports take ten seconds and more, and are paid once for all rounds.

    python -m harness.bench.generator

Reads one JSON object a line from stdin, {"args": [...], "api_key": "..."}, runs vLLM's own command with these arguments
(each names the file of its result), and answers with one JSON line on stdout. What vLLM prints goes to stderr. This
process is the only place of the harness that imports vLLM; it talks to servers over HTTP, as any client does.
"""

import json
import os
import sys
import traceback


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ["OPENAI_API_KEY"] = asked["api_key"]
        try:
            bench(parser.parse_args(asked["args"]))
            answer = {"ok": True}
        except (Exception, SystemExit) as problem:
            traceback.print_exc()
            answer = {"ok": False, "why": f"{type(problem).__name__}: {problem}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
