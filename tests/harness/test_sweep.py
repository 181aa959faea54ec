"""What a server's end removes of /dev/shm: its own and orphans, nothing that somebody else is making at that moment."""

import os

import pytest

from harness.server import guard


@pytest.fixture
def shm(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "SHM", f"{tmp_path}/")
    return tmp_path


def test_orphans_and_what_was_seen_go_and_the_rest_stays(shm):
    for name in ("psm_orphan", "seen", "strange"):
        (shm / name).touch()
    held = (shm / "psm_held").open("w")
    with held:
        guard.sweep({str(shm / "seen")}, born=0)
        assert sorted(path.name for path in shm.iterdir()) == ["psm_held", "strange"]
    guard.sweep(set(), born=(shm / "psm_held").stat().st_ctime + 60)
    assert (shm / "psm_held").exists()  # an orphan, but older than this server
    guard.sweep(set(), born=0)
    assert [path.name for path in shm.iterdir()] == ["strange"]


def test_what_another_server_makes_meanwhile_stays(shm, monkeypatch):
    """Its maker may have been looked at before it mapped the file (`open shm in SHMManager failed`, seen once)."""

    def pids():
        (shm / "vllm_dist_1cpushm_0").touch()
        return [os.getpid()]

    monkeypatch.setattr(guard.psutil, "pids", pids)
    guard.sweep(set(), born=0)
    assert (shm / "vllm_dist_1cpushm_0").exists()
