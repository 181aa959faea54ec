"""Containers as the place where servers run: a launch as for a process, told in the container's own paths and port."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cell import Cell, python
from harness.models.recipe import PREFIX
from harness.need import need_of
from harness.passed import passed
from harness.server.container import GUARD_LABEL, PORT, identity
from harness.server.launch import Launch, make_launch

if TYPE_CHECKING:
    from harness.images import Built


_KEY = "VLLM_API_KEY"
#: A container may take so many times what its cell leased, which was measured without compilers and the page cache.
MEMORY_SLACK = 2


class NoDocker(ValueError):
    """Containers cannot be had here; the text says why and what to do."""


class Containers:
    """Servers run in images that `harness.images` built of this very code, one for CPU cells and one for GPU cells."""

    name = "docker"

    def __init__(self, images: "dict[str, Built]"):
        self.images = images

    @classmethod
    def found(cls) -> "Containers":
        """With the images that are there. NoDocker where no daemon answers. What killed guards left is removed."""
        client = connect()
        remove_orphans(client)
        from harness.images import current

        return cls(current(client))

    @property
    def image(self) -> str:
        return " ".join(f"{kind}={built.digest}" for kind, built in sorted(self.images.items()))

    @property
    def versions(self) -> dict[str, str]:
        """Versions that are the image's and not this environment's."""
        found = {f"image {kind}": built.digest.removeprefix("sha256:")[:12] for kind, built in self.images.items()}
        vllm = sorted({built.vllm for built in self.images.values()})
        return {**({"vllm": " and ".join(vllm)} if vllm else {}), **found}

    def launch(self, cell: Cell, folder: Path, port: int, gpus: tuple[str, ...]) -> Launch:
        made = make_launch(cell, folder, port)
        kind = "cpu" if cell.hardware == "cpu" else "cuda"
        image = self.images[kind].digest if kind in self.images else f"helix-{kind} of this code"
        mounts, names = [], {}
        if Path(made.model).is_dir():
            names[made.model] = f"/models/{Path(made.model).name}"
            mounts.append(f"{made.model}:{names[made.model]}:ro")
            if cell.model.startswith(PREFIX):
                _let_read(Path(made.model))
        elif (hub := hub_cache()).is_dir():
            mounts.append(f"{hub}:/models/hub:ro")
        if made.proof_dir:
            made.proof_dir.mkdir(parents=True, exist_ok=True)
            made.proof_dir.chmod(0o777)  # written by the container's user
            names[str(made.proof_dir)] = "/proof"
            mounts.append(f"{made.proof_dir}:/proof:rw")
        env = passed(dict(made.env)) | {_KEY: made.api_key}
        if not Path(made.model).is_dir():  # the cache is read-only: what is not in it is missing, and is not fetched
            env |= {"HF_HUB_CACHE": "/models/hub", "HF_HUB_OFFLINE": "1"}
        env |= dict(cell.env)
        options = ["--image", image, "--port", str(port)]
        for option, values in (("--mount", mounts), ("--gpu", gpus), ("--env", sorted(env))):
            options += [word for value in values for word in (option, value)]
        options += ["--memory", limit] if (limit := memory_limit(cell)) else []
        guarded = {**{name: value for name, value in os.environ.items() if name not in env}, **env}
        return made.model_copy(
            update={
                "argv": tuple(_inside(made.argv, names)),
                "env": tuple(sorted(guarded.items())),
                "guard": ("harness.server.container", *options),
            }
        )


def memory_limit(cell: Cell) -> str:
    """What a CPU cell's container may take, as Docker writes it; "" for a GPU cell, whose host memory is not leased.

    One that takes far more than it leased is then out of memory by itself, and takes nobody along.
    """
    return f"{MEMORY_SLACK * leased // 2**20}m" if (leased := need_of(cell, cores=1).memory_bytes) else ""


def _let_read(folder: Path) -> None:
    """A made model is no secret, and safetensors writes files that only their maker may read."""
    for path in folder.iterdir():
        mode = path.stat().st_mode
        if not mode & 0o004:
            path.chmod(mode | 0o444)


def _inside(argv: tuple[str, ...], names: dict[str, str]) -> list[str]:
    """The same command in the container's paths, listening where the host's port is published."""
    words = list(argv)
    words[0] = "python3" if words[0] == python() else words[0]
    words[words.index("--host") + 1] = "0.0.0.0"  # of the container, which has a network of its own
    words[words.index("--port") + 1] = str(PORT)
    for outside, inside in names.items():
        words = [word.replace(outside, inside) for word in words]
    return words


def hub_cache() -> Path:
    """Where models from the hub lie on this host."""
    root = os.environ.get("HF_HUB_CACHE") or f"{os.environ.get('HF_HOME') or Path.home() / '.cache/huggingface'}/hub"
    return Path(root)


def connect():
    """A client of the Docker daemon. NoDocker, with the reason, where there is none."""
    try:
        import docker
        from docker.errors import DockerException
    except ImportError:
        raise NoDocker("the Docker SDK is not installed; pip install 'helix-parallel[docker]'") from None
    try:
        client = docker.from_env(timeout=30)
        client.ping()
        return client
    except (DockerException, OSError) as problem:
        raise NoDocker(f"no Docker daemon answers ({problem}); start it, or use --runtime process") from None


def remove_orphans(client) -> list[str]:
    """Remove containers whose guard is dead, which a guard killed by -9 leaves; returns their names.

    Another harness may clean up at the same time: what it removed is gone, and that is all that is wanted.
    """
    from docker.errors import APIError

    removed = []
    for container in client.containers.list(all=True, filters={"label": GUARD_LABEL}, ignore_removed=True):
        if abandoned(container.labels[GUARD_LABEL]):
            with contextlib.suppress(APIError):
                container.remove(force=True, v=True)
                removed.append(container.name)
    return removed


def abandoned(guard: str) -> bool:
    """Whether the process with this `identity` has ended. A guard of another host, container or boot is not judged."""
    here = identity(os.getpid()).split(":")[:2]
    boot, _, rest = guard.partition(":")
    namespace, _, rest = rest.partition(":")
    pid = rest.partition(":")[0]
    return [boot, namespace] == here and pid.isdigit() and identity(int(pid)) != guard
