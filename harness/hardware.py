"""What this host has: CUDA devices by compute capability, or its CPU. Detected, never assumed.

NVML is asked first, `nvidia-smi` second. A host with a usable GPU counts as GPU host: CPU cells run there only when
asked for with `--hardware cpu`.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from harness.frozen import Frozen


class Hardware(Frozen):
    """One kind of device of this host. `count` is GPUs, or logical cores; `memory_bytes` is per GPU, or of the host.

    `hosts`: of a cluster, how many have that many; a server may span them.
    `detected` is False for hardware that the user only named, to plan for it.
    `nvlinks`: the pairs of GPUs that NVLink joins, by their numbers on the host; None where NVML does not say.
    """

    family: str
    name: str
    count: int
    memory_bytes: int
    compute_capability: str | None = None
    detected: bool = True
    hosts: int = 1
    nvlinks: tuple[tuple[int, int], ...] | None = None

    def holds(self, ranks: int) -> bool:
        """Whether its GPUs take so many ranks: on one host, or in equal parts on several."""
        return any(ranks % hosts == 0 and ranks // hosts <= self.count for hosts in range(1, self.hosts + 1))

    def __str__(self) -> str:
        memory = f"{self.memory_bytes / 2**30:.0f} GiB"
        if not self.detected:
            return f"{self.family} (assumed, not on this host)"
        several = f"{self.hosts} hosts of " if self.hosts > 1 else ""
        if self.family == "cpu":
            return f"cpu ({several}{self.name}, {self.count} cores, {memory})"
        what = f"{self.count} x {self.name}, {memory} each, compute capability {self.compute_capability}"
        return f"{self.family} ({several}{what}{self._topology()})"

    def _topology(self) -> str:
        if self.count < 2:
            return ""
        if self.nvlinks is None:
            return ", NVLink unknown"
        if len(self.nvlinks) == self.count * (self.count - 1) // 2:
            return ", NVLink between all"
        pairs = ", ".join(f"{one}-{other}" for one, other in self.nvlinks)
        return f", NVLink only between {pairs}" if pairs else ", no NVLink"


class Device(NamedTuple):
    """One GPU as the driver reports it; memory in bytes, compute capability as `9.0`.

    `nvlinks`: for each GPU of the host whether NVLink joins the two, None where that is not known.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    number: int = 0
    nvlinks: tuple[bool | None, ...] = ()


def family_of(compute_capability: str) -> str:
    """`9.0` -> `hopper`, `10.3` -> `blackwell`, `12.0` -> `blackwell-rtx`; others by number: `sm75`."""
    from helix_runtime.capabilities import hardware_family

    major, _, minor = compute_capability.partition(".")
    try:
        return hardware_family(int(major), int(minor or 0))
    except ValueError:
        return f"sm{major}{minor}"


def detect(query: Callable[[], list[Device]] | None = None, visible: str | None = None) -> list[Hardware]:
    """The GPUs of this host by family, or its CPU when it has none. `visible` defaults to CUDA_VISIBLE_DEVICES."""
    devices = (query or _query)()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    devices = _limit(devices, visible)
    groups: dict[str, list[Device]] = {}
    for device in devices:
        groups.setdefault(family_of(device.compute_capability), []).append(device)
    found = [
        Hardware(
            family=family,
            name=members[0].name,
            count=len(members),
            memory_bytes=min(member.memory_bytes for member in members),
            compute_capability=members[0].compute_capability,
            nvlinks=_joined(members),
        )
        for family, members in groups.items()
    ]
    return found or [cpu()]


def _joined(members: Sequence[Device]) -> tuple[tuple[int, int], ...] | None:
    """The pairs of `members` that NVLink joins; None where it is not known of every pair."""
    pairs = []
    for one, other in combinations(members, 2):
        joined = one.nvlinks[other.number] if one.nvlinks else None
        if joined is None:
            return None
        pairs += [(one.number, other.number)] if joined else []
    return tuple(pairs)


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Hardware:
    """This host's CPU: usable logical cores, and the memory of the whole host."""
    name = "unknown CPU"
    if cpuinfo.exists():
        names = (line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line)
        name = next(names, name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(family="cpu", name=name, count=len(os.sched_getaffinity(0)), memory_bytes=memory)


def choose(wanted: Sequence[str], found: Sequence[Hardware]) -> list[Hardware]:
    """The hardware to plan for: `wanted` families (`--hardware`), taken from `found` where they are there.

    The CPU is always there. A family that is not is returned with `detected=False`: good for listing, not for running.
    """
    if not wanted:
        return list(found)
    by_family = {hardware.family: hardware for hardware in found}
    chosen = []
    for family in dict.fromkeys(wanted):
        assumed = Hardware(family=family, name="assumed", count=0, memory_bytes=0, detected=False)
        chosen.append(by_family.get(family) or (cpu() if family == "cpu" else assumed))
    return chosen


def _limit(devices: list[Device], visible: str | None) -> list[Device]:
    """Only the devices that CUDA would show. UUIDs are not resolved here: then only the number of devices is right."""
    if visible is None:
        return devices
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    if all(entry.isdigit() for entry in entries):
        return [devices[int(entry)] for entry in entries if int(entry) < len(devices)]
    return [device._replace(nvlinks=()) for device in devices[: len(entries)]]


def _query() -> list[Device]:
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return []  # saves the import and the call on hosts without a GPU
    return _query_nvml() or _query_smi()


def _query_nvml() -> list[Device]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver: the next source is asked
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [_nvml_device(pynvml, number, handles) for number in range(len(handles))]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _nvml_device(pynvml, number: int, handles: Sequence) -> Device:
    handle = handles[number]
    name = pynvml.nvmlDeviceGetName(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    name = name.decode() if isinstance(name, bytes) else name
    memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    nvlinks = tuple(None if other is handle else _nvlink(pynvml, handle, other) for other in handles)
    return Device(name, f"{major}.{minor}", memory, number, nvlinks)


def _nvlink(pynvml, one, other) -> bool | None:
    """Whether NVLink joins two GPUs; None where NVML does not know."""
    try:
        status = pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except pynvml.NVMLError:
        return None
    return None if status == pynvml.NVML_P2P_STATUS_UNKNOWN else status == pynvml.NVML_P2P_STATUS_OK


def _query_smi() -> list[Device]:
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_smi(done.stdout)


def parse_smi(text: str) -> list[Device]:
    """Lines of `name, compute capability, MiB` -> devices; lines that are something else are left out."""
    devices = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.rsplit(",", 2)]
        if len(fields) == 3 and fields[1].replace(".", "", 1).isdigit() and fields[2].isdigit():
            devices.append(Device(fields[0], fields[1], int(fields[2]) * 2**20))
    return devices
