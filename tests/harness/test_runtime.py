"""Which runtime `--runtime` gives: containers on a host with GPUs, Docker and an image of this code; else processes."""

from itertools import pairwise

import pytest

from harness.cell import Cell, Mode
from harness.cli import UsageError
from harness.hardware import Hardware
from harness.images import Built
from harness.need import need_of
from harness.run import choose_runtime
from harness.server.containers import Containers, NoDocker

HOPPER = Hardware(family="hopper", name="H", count=8, memory_bytes=80 * 2**30, compute_capability="9.0")
CPU = Hardware(family="cpu", name="c", count=2, memory_bytes=2**34)


def built(kind: str) -> Built:
    return Built(
        kind=kind, digest=f"sha256:{kind}0123456789abcdef", key="k", code="c", vllm="0.32.0", version="0.1.0",
        commit="", created="2026-11-25T00:00:00Z", megabytes=1,
    )  # fmt: skip


@pytest.fixture
def found(monkeypatch):
    """`found("cuda", …)`: a daemon with these images; `found(None)`: none answers."""

    def have(*kinds: str | None) -> None:
        def look(cls):
            if None in kinds:
                raise NoDocker("no Docker daemon answers (x); start it, or use --runtime process")
            return cls({kind: built(kind) for kind in kinds})

        monkeypatch.setattr(Containers, "found", classmethod(look))

    return have


def test_auto_takes_containers_on_a_gpu_host_with_an_image_of_this_code(found):
    found("cuda", "cpu")
    assert choose_runtime("auto", [HOPPER]) == ("docker", "auto; images: cuda cuda01234567")
    assert choose_runtime("docker", [HOPPER]) == ("docker", "as asked; images: cuda cuda01234567")
    assert choose_runtime("docker", [CPU]) == ("docker", "as asked; images: cpu cpu012345678")


def test_auto_takes_processes_where_something_lacks_and_says_what(found):
    found("cuda")
    assert choose_runtime("auto", [CPU])[0] == "process"
    assert choose_runtime("process", [HOPPER]) == ("process", "as asked")
    found("cpu")
    lack = "no image of this code; build it: python -m harness images build cuda"
    assert choose_runtime("auto", [HOPPER]) == ("process", f"auto: {lack}")
    with pytest.raises(UsageError, match=f"--runtime docker: {lack}"):
        choose_runtime("docker", [HOPPER])
    found(None)
    assert choose_runtime("auto", [HOPPER])[1].startswith("auto: no Docker daemon answers")


def test_a_cpu_cells_container_may_take_twice_what_its_lease_holds_and_a_gpu_cells_any(monkeypatch, tmp_path):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    serve = (("kv-cache-memory-bytes", 2**26),)
    cpu = Cell(mode=Mode.HELIX_GQA, backend="HELIX_CPU", hardware="cpu", model="recipe:llama-k4", tp=4, serve=serve)
    gpu = Cell(mode=Mode.HELIX_GQA, backend="FLASH_ATTN", hardware="hopper", model="org/model", tp=4)
    guards = [Containers({}).launch(cell, tmp_path / cell.key, 21000, ()).guard for cell in (cpu, gpu)]
    limit = guards[0][guards[0].index("--memory") + 1]
    assert limit == "6656m" and int(limit[:-1]) * 2**20 == 2 * need_of(cpu, cores=2).memory_bytes
    assert "--memory" not in guards[1]


@pytest.mark.parametrize("model", ["recipe:llama-k4", "org/model"])
def test_a_container_sees_models_read_only_and_of_the_host_else_its_proof_folder(model, monkeypatch, tmp_path):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cell = Cell(mode=Mode.HELIX_GQA, backend="FLASH_ATTN", hardware="hopper", model=model, tp=4)
    launch = Containers({}).launch(cell, tmp_path / "cell", 21000, ())
    mounts = [value for word, value in pairwise(launch.guard) if word == "--mount"]
    assert [mount.rpartition(":")[2] for mount in mounts] == ["ro", "rw"]
    assert ":/models/" in mounts[0] and mounts[1] == f"{tmp_path}/cell/proof:/proof:rw"
    assert model.startswith("recipe:") or dict(launch.env)["HF_HUB_OFFLINE"] == "1"
