"""The page in real Chromium: filters, deep links, hostile text, packed bodies, narrow and wide screens."""

import examples
import pytest
from playwright.sync_api import expect

from harness import report
from harness.report.text import fragment

pytestmark = pytest.mark.browser
FAILED = next(one.cell.id for one in examples.results() if one.verdict == "fail")


@pytest.fixture
def visit(browser):
    """visit(folder, hash) -> page; any network request, script error or console error fails the test."""
    contexts, problems = [], []

    def open_page(folder, fragment_="", width=1400, height=900, scheme="light", path="index.html"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
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


def test_a_square_leads_to_its_cells(visit, run_dir):
    page = visit(run_dir)
    page.click("a.square.v-fail")
    expect(page.locator("output")).to_have_text("2 of 32 cells")
    assert page.locator("details.cell:visible .name").all_text_contents() == [
        "TP 8 · KVP 2 · TPA 4 · a2a · interleave 16",
        "TP 8 · KVP 4 · TPA 2 · a2a · interleave 16",
    ]


def test_filter_state_is_in_the_address_and_comes_back(visit, run_dir):
    page = visit(run_dir)
    page.select_option("[name=verdict]", "skip")
    page.fill("[name=text]", "cutlass")
    expect(page.locator("output")).to_have_text("3 of 32 cells")
    again = visit(run_dir, page.url.split("#")[1])
    expect(again.locator("output")).to_have_text("3 of 32 cells")
    assert again.input_value("[name=text]") == "cutlass"
    again.click("button[type=reset]")
    expect(again.locator("output")).to_have_text("32 cells")
    assert "#" not in again.url


def test_a_deep_link_opens_its_cell_and_a_lost_one_says_so(visit, run_dir):
    page = visit(run_dir, fragment(cell=FAILED))
    opened = page.locator("details.cell[open]")
    expect(opened).to_have_count(1)
    assert opened.get_attribute("data-id") == FAILED
    expect(opened.locator(".body")).to_be_in_viewport()
    lost = visit(run_dir, "cell=hopper/gone")
    expect(lost.locator(".missing")).to_have_text("This run has no cell hopper/gone.")


def test_keyboard_alone_reaches_and_opens_a_cell(visit, run_dir):
    page = visit(run_dir)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("[name=text]")).to_be_focused()
    page.keyboard.type("swap-chunks")
    expect(page.locator("output")).to_have_text("1 of 32 cells")
    page.locator("button[type=reset]").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("details.cell[open]")).to_have_count(1)


def test_hostile_text_is_text(visit, hostile_dir):
    page = visit(hostile_dir, fragment(cell=examples.hostile().cell.id))
    expect(page.locator("details.cell[open]")).to_have_count(1)
    page.click("details.cell[open] .unpack")
    expect(page.locator("details.cell[open] .log")).to_contain_text("</script><script>window.pwned")
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 1 and page.locator("img").count() == 0


def test_packed_bodies_open(visit, tmp_path):
    report.write(examples.write_ledger(tmp_path, [*examples.many(130), examples.hostile()]))
    page = visit(tmp_path, fragment(cell=examples.hostile().cell.id))
    body = page.locator("details.cell[open] .body")
    expect(body).to_contain_text("Run just this cell again")
    expect(body).to_contain_text("Proof of path")
    assert page.evaluate("window.pwned") is None


@pytest.mark.parametrize("width", [380, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out(visit, run_dir, width, scheme):
    page = visit(run_dir, fragment(cell=FAILED), width=width, scheme=scheme)
    expect(page.locator("details.cell[open]")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_index_opens(visit, tmp_path):
    report.write(examples.write_ledger(tmp_path / "runs" / "local", examples.results(), name="local"))
    report.index(tmp_path)
    page = visit(tmp_path)
    page.click("text=local >> nth=0")
    expect(page.locator("h1")).to_have_text("5 cells differ from what is declared")
