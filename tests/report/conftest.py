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
def sequence_dir(tmp_path_factory):
    """The last of three runs, drawn with the two before it; its reports folder has an index."""
    reports = tmp_path_factory.mktemp("reports")
    last = examples.sequence(reports)
    for run in sorted((reports / "runs").iterdir()):
        report.write(run)
    report.index(reports)
    return last


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


@pytest.fixture
def visit(browser):
    """visit(folder, hash) -> page; any network request, script error or console error fails the test."""
    contexts, problems = [], []

    def open_page(folder, fragment_="", width=1400, height=900, scheme="light", path="index.html", **more):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.on(
            "request",
            lambda request: (
                request.url.startswith("file:") or request.url.startswith("data:") or problems.append(request.url)
            ),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.goto(f"file://{folder}/{path}{'#' + fragment_ if fragment_ else ''}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
