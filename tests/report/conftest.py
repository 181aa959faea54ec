"""A report of the example run, written once; and Chromium, where there is one."""

import shutil

import examples
import pytest

from harness import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    found = examples.write_ledger(tmp_path_factory.mktemp("report") / "a", examples.results())
    report.write(found)
    return found


@pytest.fixture(scope="session")
def hostile_dir(tmp_path_factory):
    """A run that was cut off, with a hostile cell and two records that nobody knows."""
    found = examples.write_ledger(
        tmp_path_factory.mktemp("report") / "h",
        [*examples.results(), examples.hostile()],
        name=examples.HOSTILE,
        finished=False,
    )
    with (found / "ledger.ndjson").open("a") as stream:
        stream.write('{"event": "lunch"}\n{"event": "result", "result": {"cell": {"mode": "old"}}}\n{"event": "resu')
    report.write(found)
    return found


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium on this host")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield found
        found.close()
