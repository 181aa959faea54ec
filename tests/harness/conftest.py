"""Shared by the fault tests: a small disk; one Docker daemon a module, with a tiny base image in it."""

import os
import subprocess

import pytest


@pytest.fixture(scope="module")
def docker():
    """A running daemon (`docker_daemon.Daemon`) with the tiny image and a `client`; what was put there goes again."""
    import stand_in
    from docker_daemon import cli, daemon

    from harness.server.containers import connect

    with daemon() as running:
        stand_in.make("tiny", stand_in.TINY, cli())
        running.client = connect()
        yield running
        if running.process is None:
            running.client.images.remove(stand_in.TINY, force=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 1 MiB; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("mounting takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
