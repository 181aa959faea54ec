"""Shared by the tests with containers: one daemon a module, with a tiny base image in it."""

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
