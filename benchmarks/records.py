"""Results as flat records, which the planner fits its efficiency factors from: what, how large, how long, where."""

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

    def by_case(self, prefix: str = "") -> dict[str, dict[str, float]]:
        """Case -> name, without `prefix` -> median microseconds, in the order of the records."""
        found: dict[str, dict[str, float]] = {}
        for record in self.records:
            found.setdefault(record.extra["case"], {})[record.name.removeprefix(prefix)] = record.us
        return found

    def failed(self, what: str, error: BaseException) -> None:
        """Keep a failure as a result of its own, and go on."""
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        self.failures.append({"what": what, "error": text})
        print(f"FAILED {what}: {text}", flush=True)

    def write(self) -> None:
        """`rows` holds the best of each operation, case and series, as the planner reads them; `others` the rest."""
        if not self.path:
            return
        best: dict[tuple, Record] = {}
        for record in self.records:
            key = (record.name, record.extra.get("case"))
            if key not in best or record.us < best[key].us:
                best[key] = record
        rows = {id(record) for record in best.values()}
        document = {
            "benchmark": self.benchmark,
            "command": self.command,
            "device": self.gpu,
            "versions": self.versions,
            "rounds": self.rounds,
            "rows": [_to_row(record) for record in self.records if id(record) in rows],
            "others": [_to_row(record) for record in self.records if id(record) not in rows],
            "failures": self.failures,
        }
        self.path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        document = json.loads(path.read_text())
        records = [_from_row(row) for row in [*document["rows"], *document["others"]]]
        heads = (document[key] for key in ("benchmark", "command", "device", "versions"))
        return cls(*heads, path, document["rounds"], records, document["failures"])


def _to_row(record: Record) -> dict:
    operation, _, series = record.name.partition("/")
    times = [record.us, record.us_low, record.us_high]
    row = {"operation": operation, "case": record.extra.get("case", ""), "params": record.params}
    row |= {"bytes": record.bytes, "flops": record.flops, "us": {series: times}}
    return row | {key: value for key, value in record.extra.items() if key != "case"}


def _from_row(row: dict) -> Record:
    known = ("operation", "case", "params", "bytes", "flops", "us")
    (series, times), *_ = row["us"].items()
    extra = {"case": row["case"]} | {key: value for key, value in row.items() if key not in known}
    return Record(f"{row['operation']}/{series}", row["params"], row["bytes"], row["flops"], *times, extra)
