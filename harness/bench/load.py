"""Asks the load generator for one round at a time and waits for its file."""

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from harness.bench.spec import BenchSpec, Load
from harness.server.launch import Launch

PERCENTILES = "50,95,99"
#: Seconds for one round, imports of the first one included.
DEADLINE = 3600.0


class LoadFailed(Exception):
    """The generator could not run a round; the text says why, and names its log."""


class Generator:
    """The process of `harness.bench.generator`; a context manager. `cancel` ends a round that runs."""

    def __init__(self, log: Path, cancel: threading.Event):
        self.log = log
        self.cancel = cancel
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Generator":
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.bench.generator"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        process = self._process
        process.stdin.close()
        if error is not None:
            process.kill()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def run(self, args: list[str], api_key: str) -> None:
        """One round. Raises LoadFailed; KeyboardInterrupt is left alone."""
        process = self._process
        line = json.dumps({"args": args, "api_key": api_key}) + "\n"
        try:
            process.stdin.write(line.encode())
            process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("the load generator died") from None
        until = time.monotonic() + DEADLINE
        while not select.select([process.stdout], [], [], 0.2)[0]:
            if self.cancel.is_set():
                raise LoadFailed("the run was interrupted")
            if time.monotonic() > until:
                raise self._failed(f"a round took longer than {DEADLINE:.0f} s")
        heard = process.stdout.readline()
        if not heard:
            raise self._failed("the load generator died")
        answer = json.loads(heard)
        if not answer["ok"]:
            raise self._failed(answer["why"])

    def _failed(self, why: str) -> LoadFailed:
        return LoadFailed(f"{why}; its log: {self.log}")


def arguments(launch: Launch, spec: BenchSpec, load: Load, seed: int, file: Path) -> list[str]:
    """`vllm bench serve`'s arguments for one round; another `seed` asks other prompts, so that no prefix is cached."""
    return [
        *("--backend", "openai", "--base-url", launch.url, "--model", launch.name, "--tokenizer", launch.model),
        *("--dataset-name", "random", "--random-input-len", str(load.input), "--random-output-len", str(load.output)),
        *("--num-prompts", str(load.per_round), "--max-concurrency", str(load.concurrency), "--seed", str(seed)),
        *("--ignore-eos", "--temperature", "0", "--disable-tqdm", "--num-warmups", str(min(load.concurrency, 4))),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", PERCENTILES),
        *spec.goodput.to_args(),
        *("--save-result", "--result-dir", str(file.parent), "--result-filename", file.name),
    ]
