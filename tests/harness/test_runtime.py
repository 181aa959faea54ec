"""Which runtime `--runtime` gives: containers on a host with GPUs, Docker and an image of this code; else processes."""

import pytest

from harness.cli import UsageError
from harness.hardware import Hardware
from harness.images import Built
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
