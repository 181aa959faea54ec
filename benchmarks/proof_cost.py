"""What the proof of path costs a decode step on a GPU.

    python -m benchmarks.proof_cost [--json FILE]                   the counters alone, in µs; needs torch and CUDA
    python -m benchmarks.proof_cost --model MODEL --tp 2 --dcp 2    steps of a real engine, with and without

The first times what a step adds: the addition inside a CUDA graph, one whatever the number of layers (against the same
graph without), and the counting of tokens outside it, on the device and on the host that launches it. The second starts
vLLM with the proof and without it, in turns, decodes the same tokens, and compares the time of a step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

LAYERS, BATCH = 61, 64  # DeepSeek-V3's layers; requests that decode at the same time
TARGET = 0.01


def counters_alone(layers: int = LAYERS, batch: int = BATCH, rounds: int = 200) -> dict:
    """Medians in µs: `graph`, a replay's addition; `tokens_device` and `tokens_host`, counting tokens once a step;
    `eager_host`, all layers of a step whose attention is outside of graphs (eager, PIECEWISE).

    Both on the device are queued behind other work.
    """
    import torch

    from helix_runtime.proof import ProofWriter
    from helix_runtime.vllm_plugin.device_proof import count_tokens

    proof = ProofWriter(None, 0)
    counters = proof.count_on(torch.device("cuda"))
    work = torch.zeros(1024, device="cuda")

    def graph_of(counted: bool) -> torch.cuda.CUDAGraph:
        # One small kernel a layer stands for the rest of it, so that the addition is not the whole graph.
        made = torch.cuda.CUDAGraph()
        with torch.cuda.graph(made):
            for _ in range(layers):
                work.add_(1)
                if counted:
                    proof.ran("decode", captured=True)
        return made

    with_proof, without = graph_of(True), graph_of(False)
    counters.flush()
    added = [_device_us(with_proof.replay, True) - _device_us(without.replay, True) for _ in range(rounds)]
    counters.reset()
    torch.cuda.synchronize()
    with_proof.replay()
    torch.cuda.synchronize()
    seen = counters.read()[counters.names.index("decode_combine")]
    if seen != layers:
        raise SystemExit(f"a replay counted {seen} combines, not {layers}: the counters do not work under CUDA graphs")

    context = SimpleNamespace(proof=proof, interleave=16, kvp=2, kvp_rank=1)
    slots = torch.arange(batch, device="cuda") - batch // 2
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    positions = torch.arange(batch, device="cuda")

    def step() -> None:
        count_tokens(context, slots, starts, positions)

    for _ in range(10):
        step()
    device = [_device_us(step, behind=True) for _ in range(rounds)]
    host = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        host.append((time.perf_counter() - began) * 1e6)
    eager = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(layers):
            proof.ran("decode", captured=torch.cuda.is_current_stream_capturing())
        eager.append((time.perf_counter() - began) * 1e6)
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": layers, "batch": batch,
        "graph_us": statistics.median(added), "tokens_device_us": statistics.median(device),
        "tokens_host_us": statistics.median(host),
        "eager_host_us": statistics.median(eager), "combines_seen_by_a_replay": seen,
    }  # fmt: skip


def _device_us(work, behind: bool = False) -> float:
    """Time of `work` on the device, in µs. `behind`: queued behind other work, as in a server: its host runs ahead."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if behind:
        torch.cuda._sleep(1_000_000)  # half a millisecond: longer than the launches take
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


ENGINE = """
import json, sys, time


def main():
    from vllm import LLM, SamplingParams

    asked = json.loads(sys.argv[1])
    llm = LLM(**asked["engine"])
    lengths = range(asked["prompt"], asked["prompt"] + asked["batch"])
    prompts = [{"prompt_token_ids": [5 + (i * n) % 400 for i in range(n)]} for n in lengths]

    def seconds(tokens):
        began = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - began

    few, many = asked["tokens"] // 4, asked["tokens"]
    seconds(few)
    # Two lengths: what is left of their difference is decode alone.
    steps = [(seconds(many) - seconds(few)) / (many - few) for _ in range(asked["rounds"])]
    time.sleep(1)  # the counters are copied out
    print("STEPS " + json.dumps(steps), flush=True)


if __name__ == "__main__":
    main()
"""


def step_seconds(engine: dict, args: argparse.Namespace) -> list[float]:
    """Seconds of a decode step, once a round, of a fresh engine."""
    asked = {
        "engine": engine, "prompt": args.prompt, "batch": args.batch, "tokens": args.tokens, "rounds": args.rounds,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "engine.py"
        script.write_text(ENGINE)
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(asked)], capture_output=True, text=True, check=False
        )
    found = [line for line in done.stdout.splitlines() if line.startswith("STEPS ")]
    if not found:
        raise SystemExit(f"the engine gave no time:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(found[-1].removeprefix("STEPS "))


def engines(args: argparse.Namespace) -> dict:
    """Median step with and without the proof, engines in turns, and the counters that the proof ended with."""
    from helix_runtime.proof import read_proofs

    times: dict[str, list[float]] = {"with": [], "without": []}
    seen: dict[str, int] = {}
    for turn in range(args.turns):
        for name in ("with", "without") if turn % 2 == 0 else ("without", "with"):
            with tempfile.TemporaryDirectory() as folder:
                helix = {"helix_mode": args.helix, **json.loads(args.options)}
                helix |= {"proof_dir": folder} if name == "with" else {}
                times[name] += step_seconds(
                    {
                        "model": args.model, "tensor_parallel_size": args.tp, "decode_context_parallel_size": args.dcp,
                        "additional_config": {"helix": helix}, **json.loads(args.engine),
                    },
                    args,
                )  # fmt: skip
                if name == "with":
                    seen = read_proofs(folder)[0].counters
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "model": args.model, "tp": args.tp, "dcp": args.dcp, "helix": args.helix, "batch": args.batch,
        "prompt": args.prompt, "steps_s": times, "median_s": medians,
        "share": medians["with"] / medians["without"] - 1, "target": TARGET, "counters_of_rank_0": seen,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="time a real engine with this model")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dcp", type=int, default=2)
    parser.add_argument("--helix", action="store_true", help="Helix mode; standard DCP otherwise")
    parser.add_argument("--options", default="{}", help="further helix options, as JSON")
    parser.add_argument("--engine", default="{}", help="further engine arguments, as JSON")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to decode a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds an engine")
    parser.add_argument("--turns", type=int, default=2, help="engines of each kind")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = engines(args) if args.model else counters_alone()
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
