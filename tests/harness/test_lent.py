"""What a host of a cluster does for one cell, called here as Ray would call it there."""

from test_executor import CELL
from test_server import launch

from harness.executors.lent import files_of, probe, put_back, serve
from harness.executors.local import LocalExecutor
from harness.lease import Host
from harness.need import Room
from harness.resume import code_key
from harness.server.log import Cause
from harness.server.place import Processes
from harness.server.process import Limits
from harness.transcript import Transcript

ROOM = Room(cores=8, memory_bytes=2**40)
LIMITS = Limits(start=20, stop=0.3)


class Stubs(Processes):
    behaviour = "well"

    def launch(self, cell, folder, port, gpus):
        return launch(self.behaviour, port).model_copy(update={"proof_dir": folder / "proof"})


class Refuses(Stubs):
    behaviour = "refused"


def test_what_a_cell_leaves_comes_back_and_is_what_local_leaves(tmp_path):
    served = serve(CELL, None, True, "process", LIMITS, ROOM, Stubs())
    put_back(served.files, tmp_path / "there")
    local = LocalExecutor(LIMITS, Stubs(), Host(ROOM)).attempt(CELL, tmp_path / "here", None)
    assert Transcript.load(tmp_path / "there" / "transcript.json").answers == local.transcript.answers
    assert sorted(served.files) == sorted(files_of(tmp_path / "here")) and served.attempt.started
    assert served.attempt.kv_cache_tokens == local.kv_cache_tokens


def test_a_failure_there_is_a_failure_here():
    served = serve(CELL, None, True, "process", LIMITS, ROOM, Refuses())
    assert served.attempt.failure.cause is Cause.REFUSED and "server.log" in served.files


def test_a_host_says_what_it_is_before_anything_is_leased():
    found = probe("process")
    assert found.code == code_key() and found.problem == "" and found.hardware
    assert dict(found.versions)["vllm"].startswith("0.32.0")


def test_a_host_without_docker_says_so(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    assert "Docker daemon" in probe("docker").problem


def test_a_long_file_comes_back_without_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.executors.lent._LARGEST", 10)
    (tmp_path / "proof").mkdir()
    (tmp_path / "proof" / "log").write_text("0123456789abcdef")
    assert files_of(tmp_path) == {"proof/log": b"01234\n[...]\nbcdef"}
