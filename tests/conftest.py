"""Shared by all tests: leases of their own; what a marker left out is said; GPU tests skip where there is no GPU."""

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest

#: Marker -> why its tests are left out by `--unit`, and how to run them.
LEFT_OUT = {
    "server": "start real vLLM servers; run them with ./test_helix.sh --unit -m server -n 0",
    "nightly": "are too heavy for every change; run them with ./test_helix.sh --nightly",
    "gpu": "need a CUDA device; run them there with ./test_helix.sh --nightly",
}
OTHER = "other"
COUNTS = pytest.StashKey[Counter]()


def pytest_configure(config):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers share few cores
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        # Kernels are interpreted. Triton reads this when its own are decorated, which is when vLLM is first imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    config.stash[COUNTS] = Counter()
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_FromWorkers(config))


@pytest.fixture(scope="session")
def lease_folders(tmp_path_factory):
    """Names of folders, which what leases there makes: a `tmp_path` for every test would cost more."""
    base = tmp_path_factory.mktemp("leases")
    return (base / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_leases(request, lease_folders):
    """No test waits for what other workers, or other runs on this host, hold or have asked for; nor they for it. Real
    servers take real cores and memory, so they lease where all do."""
    with pytest.MonkeyPatch.context() as patch:  # a test may undo its own
        if not request.node.get_closest_marker("server"):
            patch.setenv("HELIX_LEASES", str(next(lease_folders)))
        yield


def pytest_collection_modifyitems(items):
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this host"))


def pytest_deselected(items):
    for item in items:
        marker = next((name for name in LEFT_OUT if item.get_closest_marker(name)), OTHER)
        item.config.stash[COUNTS][marker] += 1


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # an xdist worker: the controller prints
        session.config.workeroutput["deselected"] = dict(session.config.stash[COUNTS])


def pytest_terminal_summary(terminalreporter, config):
    for line in deselected_lines(config.stash[COUNTS]):
        terminalreporter.write_line(line)


def deselected_lines(counts):
    """One line a marker: how many tests were left out, and why."""
    lines = [f"left out: {counts[name]} '{name}' tests, which {why}" for name, why in LEFT_OUT.items() if counts[name]]
    if counts[OTHER]:
        lines.append(f"left out: {counts[OTHER]} tests by the -k or -m given")
    return lines


class _FromWorkers:
    """Every xdist worker collects, and so deselects, the same tests: the first one's counts are the run's."""

    def __init__(self, config):
        self.config = config

    def pytest_testnodedown(self, node):
        counts = self.config.stash[COUNTS]
        if not counts:
            counts.update(getattr(node, "workeroutput", {}).get("deselected", {}))
