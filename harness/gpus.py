"""The GPUs that may be used here, by UUID, and how much of their memory is in use. NVML first, `nvidia-smi` second."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

#: A GPU is as free as before when no more than this is in use beyond what was (bytes).
SLACK = 256 * 2**20


class GpuMemory(NamedTuple):
    """Bytes in use and in all."""

    used: int
    total: int

    def free_again(self, before: "GpuMemory") -> bool:
        return self.used <= before.used + SLACK

    def __str__(self) -> str:
        return f"still uses {self.used / 2**30:.1f} of {self.total / 2**30:.1f} GiB"


def visible(asked: str | None = None, known: Sequence[str] | None = None) -> tuple[str, ...]:
    """UUIDs of the GPUs in `asked` (default: CUDA_VISIBLE_DEVICES; where unset, all), out of `known` (default: found).

    Indices count in the driver's order. As in CUDA, the first entry that names no GPU ends the list. A MIG device is
    kept by its name.
    """
    known = list(query()) if known is None else list(known)
    asked = os.environ.get("CUDA_VISIBLE_DEVICES") if asked is None else asked
    if asked is None:
        return tuple(known)
    found: list[str] = []
    for entry in (part.strip() for part in asked.split(",")):
        if entry.isdigit():
            matches = known[int(entry) : int(entry) + 1]
        else:
            matches = (
                [entry] if entry.startswith("MIG-") else [uuid for uuid in known if entry and uuid.startswith(entry)]
            )
        if len(matches) != 1 or matches[0] in found:
            break
        found += matches
    return tuple(found)


def memory_of(gpu: str) -> GpuMemory | None:
    """Of the GPU with this UUID; None where the driver does not tell."""
    return query().get(gpu)


def query() -> dict[str, GpuMemory]:
    """Every GPU of this host by UUID, in the driver's order. Empty without a driver."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return {}
    return _nvml() or _smi()


def _nvml() -> dict[str, GpuMemory]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver: the next source is asked
        return {}
    try:
        found = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid, memory = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
            found[uuid.decode() if isinstance(uuid, bytes) else uuid] = GpuMemory(int(memory.used), int(memory.total))
        return found
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


def _smi() -> dict[str, GpuMemory]:
    command = ["nvidia-smi", "--query-gpu=uuid,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = ([field.strip() for field in line.split(",")] for line in done.stdout.splitlines())
    return {
        row[0]: GpuMemory(int(row[1]) * 2**20, int(row[2]) * 2**20)
        for row in rows
        if len(row) == 3 and row[1].isdigit() and row[2].isdigit()
    }
