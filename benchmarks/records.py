"""Results as flat records, which the planner fits its efficiency factors from: what, how large, how long, where."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One measured kernel or step: bytes moved, floating-point operations, microseconds (median, 10th and 90th
    percentile). `params` are its sizes; `extra` what a table shows beside it."""

    name: str
    params: dict
    bytes: int
    flops: int
    us: float
    us_low: float
    us_high: float
    extra: dict = field(default_factory=dict)


@dataclass
class Results:
    """All records of one run, written after every size, so that a run that is cut keeps what it had."""

    benchmark: str
    command: str
    gpu: str
    versions: dict
    path: Path | None = None
    rounds: int = 20
    records: list[Record] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)

    @classmethod
    def start(cls, benchmark: str, path: Path | None, rounds: int = 20) -> "Results":
        import torch
        import triton

        arguments = [argument.rsplit("/", 1)[-1] for argument in sys.argv[1:]]  # folders are the machine's own
        command = " ".join([f"python -m benchmarks.{benchmark}", *arguments])
        versions = {"torch": torch.__version__, "triton": triton.__version__, "vllm_kernels": "0.32.0"}
        try:
            import flashinfer

            versions["flashinfer"] = flashinfer.__version__
        except ImportError:
            pass
        return cls(benchmark, command, torch.cuda.get_device_name(), versions, path, rounds)

    def add(self, record: Record) -> None:
        self.records.append(record)

    def failed(self, what: str, error: BaseException) -> None:
        """Keep a failure as a result of its own, and go on."""
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        self.failures.append({"what": what, "error": text})
        print(f"FAILED {what}: {text}", flush=True)

    def write(self) -> None:
        if self.path:
            values = dataclasses.asdict(dataclasses.replace(self, path=None))
            del values["path"]
            values["records"] = [value | {"gpu": self.gpu} for value in values["records"]]
            self.path.write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        values = json.loads(path.read_text())
        values["records"] = [
            Record(**{key: value for key, value in record.items() if key != "gpu"}) for record in values["records"]
        ]
        return cls(**values)
