"""What a host of a cluster does for one cell: start, ask and stop it; only transcripts, proofs and logs come back.

`probe` and `serve` run on that host, as Ray tasks; they import nothing of Ray.
"""

import os
import tempfile
from pathlib import Path

from harness.cell import Cell
from harness.executors.local import Attempt, LocalExecutor
from harness.frozen import Frozen
from harness.hardware import Hardware, detect
from harness.lease import Host
from harness.need import Room
from harness.resume import code_key
from harness.server.place import Place, make_place
from harness.server.process import Limits
from harness.transcript import Transcript

#: Files of a cell's folder that come back, in bytes at most; a longer log comes back without its middle.
_LARGEST = 32 * 2**20


class Probe(Frozen):
    """What a host says of itself before anything is leased there. `problem`: why servers cannot run there, or ""."""

    host: str
    hardware: tuple[Hardware, ...]
    code: str
    problem: str = ""
    offline: bool = False
    models: tuple[str, ...] = ()  # hub models in its cache
    versions: tuple[tuple[str, str], ...] = ()


class Served(Frozen):
    """One attempt as it comes back: `files` are those of the cell's folder, by relative path."""

    attempt: Attempt
    files: dict[str, bytes]
    host: str


def probe(runtime: str) -> Probe:
    """Hardware, code, images and models of this host."""
    from harness.runner import versions
    from harness.server.containers import hub_cache

    problem, found = "", dict(versions())
    try:
        place = make_place(runtime)
        found |= place.versions
        if runtime == "docker" and not place.image:
            problem = "no image of this code; build it there: python -m harness images build"
    except ValueError as told:
        problem = str(told)
    models = (folder.name.removeprefix("models--").replace("--", "/", 1) for folder in hub_cache().glob("models--*"))
    return Probe(
        host=os.uname().nodename, hardware=tuple(detect()), code=code_key(), problem=problem,
        offline=bool(os.environ.get("HF_HUB_OFFLINE")), models=tuple(sorted(models)),
        versions=tuple(found.items()),
    )  # fmt: skip


def serve(
    cell: Cell,
    follow: Transcript | None,
    ask: bool,
    runtime: str,
    limits: Limits,
    room: Room | None,
    place: Place | None,
) -> Served:
    """One attempt at `cell` on this host, in a folder that is gone afterwards."""
    executor = LocalExecutor(limits, place or make_place(runtime), Host(room) if room else Host())
    return attempt_here(executor, cell, follow, ask)


def attempt_here(executor: LocalExecutor, cell: Cell, follow: Transcript | None, ask: bool) -> Served:
    """What `executor` makes of `cell` in a folder that is gone afterwards.

    Ray cancels a task by raising KeyboardInterrupt in it: the server is then stopped on the way out.
    """
    with tempfile.TemporaryDirectory(prefix="helix-cell-") as scratch:
        folder = Path(scratch) / "cell"
        try:
            attempt = executor.attempt(cell, folder, follow, ask)
        except KeyboardInterrupt:
            executor.end_all()
            raise
        return Served(attempt=attempt, files=files_of(folder), host=os.uname().nodename)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`; the middle of a long one is left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if len(content) > _LARGEST:
                content = content[: _LARGEST // 2] + b"\n[...]\n" + content[-_LARGEST // 2 :]
            found[path.relative_to(folder).as_posix()] = content
    return found


def put_back(files: dict[str, bytes], folder: Path) -> None:
    """Write `files` into `folder`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
