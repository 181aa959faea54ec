"""Where servers run: as processes of this user, or in containers. Both are given the same launch."""

from pathlib import Path
from typing import ClassVar, Protocol

from harness.cell import Cell
from harness.server.launch import Launch, make_launch

RUNTIMES = ("process", "docker")


class Place(Protocol):
    """`image` is the digest of the image that servers run in, "" where they need none."""

    name: str
    image: str

    @property
    def versions(self) -> dict[str, str]:
        """Versions that differ from this environment's, by name."""
        ...

    def launch(self, cell: Cell, folder: Path, port: int, gpus: tuple[str, ...]) -> Launch:
        """What is started for `cell`: with these GPUs, answering on 127.0.0.1:`port`. `folder` is the cell's own."""
        ...


class Processes:
    """Servers are processes of this user."""

    name = "process"
    image = ""
    versions: ClassVar[dict[str, str]] = {}

    def launch(self, cell: Cell, folder: Path, port: int, gpus: tuple[str, ...]) -> Launch:
        made = make_launch(cell, folder, port)
        if not gpus:
            return made
        env = {**dict(made.env), "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        return made.model_copy(update={"env": tuple(sorted(env.items()))})


def make_place(runtime: str) -> Place:
    """The place called `runtime`. ValueError for an unknown one, or when containers cannot be had here."""
    if runtime == "process":
        return Processes()
    if runtime == "docker":
        from harness.server.containers import Containers

        return Containers.found()
    raise ValueError(f"runtime {runtime!r}; allowed: {', '.join(RUNTIMES)}")
