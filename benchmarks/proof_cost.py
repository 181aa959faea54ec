"""What the proof of path costs a decode step on a GPU.

    python -m benchmarks.proof_cost [--json FILE]                   the counters alone, in µs; needs torch and CUDA
    python -m benchmarks.proof_cost --model MODEL --tp 2 --dcp 2    steps of a real engine, with and without

The first times what a step adds: the addition inside a CUDA graph, one whatever the number of layers (against the same
graph without), and the counting of tokens outside it, on the device and on the host that launches it. The second starts
vLLM with the proof and without it, has both decode the same tokens in turns, and compares the time of a step.
"""

import argparse
import contextlib
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
import json, statistics, sys, time


def main():
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    asked = json.loads(sys.argv[1])
    engine = LLM(**asked["engine"]).llm_engine
    lengths = range(asked["prompt"], asked["prompt"] + asked["batch"])
    prompts = [{"prompt_token_ids": [5 + (i * n) % 400 for i in range(n)]} for n in lengths]
    kind = RequestOutputKind.DELTA
    params = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, output_kind=kind)

    def step_seconds(turn):
        for number, prompt in enumerate(prompts):
            engine.add_request(f"{turn}-{number}", prompt, params)
        found, before = [], None
        while engine.has_unfinished_requests():
            full = len(engine.step()) == len(prompts)  # every request got a token
            now = time.perf_counter()
            if full and before is not None:
                found.append(now - before)
            before = now if full else None
        return statistics.median(found)

    step_seconds("warm")
    print("READY", flush=True)
    for turn, line in enumerate(sys.stdin):
        print("STEP", step_seconds(turn), flush=True)
    time.sleep(1)  # the counters are copied out


if __name__ == "__main__":
    main()
"""


class Engine:
    """A process with one engine, which times decode steps whenever it is asked: the median of steps of a full batch."""

    def __init__(self, folder: Path, proof: bool, engine: dict, args: argparse.Namespace):
        self.proof = folder / "proof"
        helix = {"helix_mode": args.helix, **json.loads(args.options)}
        helix |= {"proof_dir": str(self.proof)} if proof else {}
        asked = {
            "prompt": args.prompt, "batch": args.batch, "tokens": args.tokens,
            "engine": {
                "model": args.model, "tensor_parallel_size": args.tp, "decode_context_parallel_size": args.dcp,
                "additional_config": {"helix": helix}, **engine,
            },
        }  # fmt: skip
        self.proof.mkdir(parents=True)
        script = folder / "engine.py"
        script.write_text(ENGINE)
        self.ready = False
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), json.dumps(asked)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def wait_for(self, word: str) -> str:
        """What follows `word` in the engine's next line that begins with it. SystemExit with its log if none comes."""
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise SystemExit(f"the engine ended:\n{self.log.read_text()[-4000:]}")

    def step_seconds(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.wait_for("STEP"))

    def end(self) -> None:
        """Let it copy its counters out, or, if it is not ready yet, stop it."""
        if not self.ready:
            self.process.terminate()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def engines(args: argparse.Namespace) -> list[dict]:
    """For each `--engine`: the median step with and without the proof, and the counters that the proof ended with.

    All engines are up at the same time, idle but for the one that is timed, and take turns round after round.
    """
    from helix_runtime.proof import read_proofs

    asked = [json.loads(text) for text in args.engine or ["{}"]]
    with tempfile.TemporaryDirectory() as home:
        pairs = [
            {
                name: Engine(Path(home) / f"{number}-{name}", name == "with", engine, args)
                for name in ("with", "without")
            }
            for number, engine in enumerate(asked)
        ]
        running = [engine for pair in pairs for engine in pair.values()]
        try:
            for engine in running:
                engine.wait_for("READY")
                engine.ready = True
            times: list[dict[str, list[float]]] = [{"with": [], "without": []} for _ in asked]
            for turn in range(args.rounds):
                for pair, found in zip(pairs, times, strict=True):
                    for name in ("with", "without") if turn % 2 == 0 else ("without", "with"):
                        found[name].append(pair[name].step_seconds())
        finally:
            for engine in running:
                engine.end()
        counters = [read_proofs(pair["with"].proof)[0].counters for pair in pairs]
    common = {name: getattr(args, name) for name in ("model", "tp", "dcp", "helix", "batch", "prompt")}
    rows = []
    for engine, found, seen in zip(asked, times, counters, strict=True):
        shares = [a / b - 1 for a, b in zip(found["with"], found["without"], strict=True)]
        rows.append(
            common
            | {"engine": engine, "median_s": {name: statistics.median(values) for name, values in found.items()}}
            | {"share": statistics.median(shares), "shares": shares, "target": TARGET}
            | {"steps_s": found, "counters_of_rank_0": seen}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="time a real engine with this model")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dcp", type=int, default=2)
    parser.add_argument("--helix", action="store_true", help="Helix mode; standard DCP otherwise")
    parser.add_argument("--options", default="{}", help="further helix options, as JSON")
    parser.add_argument("--engine", action="append", help="further engine arguments, as JSON; for several, repeat it")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to decode a round")
    parser.add_argument("--rounds", type=int, default=10, help="times each engine is timed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = engines(args) if args.model else counters_alone()
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
