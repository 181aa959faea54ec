"""Readable by everyone: axe in light and dark, no overlap on narrow and wide screens, print and forced colours."""

import examples
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from harness.report.text import fragment

pytestmark = pytest.mark.browser
FAILED = fragment(cell=next(one.cell.id for one in examples.results() if one.verdict == "fail"))
#: Visible pieces of text or drawing, as what their lines cover; two that do not hold each other may not meet.
OVERLAPS = """() => {
  const seen = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const box = node.parentElement;
    if (!node.textContent.trim() || box.closest(".sr, .skip, script, style, option, svg")) continue;
    if (!box.checkVisibility({ contentVisibilityAuto: true, visibilityProperty: true })) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const text = node.textContent.trim().slice(0, 40);
    for (const line of range.getClientRects()) if (line.width > 1) seen.push([line, box, text]);
  }
  for (const box of document.querySelectorAll("input, select, button, svg.plot, svg.bar, svg.shape"))
    if (box.checkVisibility({ contentVisibilityAuto: true }))
      seen.push([box.getBoundingClientRect(), box, box.outerHTML.slice(0, 60)]);
  const clipped = (box) => { // what a scrolling box shows of its content
    let [left, right, top, bottom] = [-1e9, 1e9, -1e9, 1e9];
    for (let outer = box; outer; outer = outer.parentElement)
      if (getComputedStyle(outer).overflowX !== "visible" || getComputedStyle(outer).display === "-webkit-box") {
        const edge = outer.getBoundingClientRect();
        [left, right] = [Math.max(left, edge.left), Math.min(right, edge.right)];
        [top, bottom] = [Math.max(top, edge.top), Math.min(bottom, edge.bottom)];
      }
    return { left, right, top, bottom };
  };
  const boxes = seen.map(([line, box, text]) => {
    const edge = clipped(box);
    return { box, text, left: Math.max(line.left, edge.left), right: Math.min(line.right, edge.right),
      top: Math.max(line.top, edge.top), bottom: Math.min(line.bottom, edge.bottom) };
  }).filter((one) => one.right - one.left > 1 && one.bottom - one.top > 1);
  boxes.sort((a, b) => a.top - b.top);
  const found = [];
  for (let i = 0; i < boxes.length; i++)
    for (let j = i + 1; j < boxes.length && boxes[j].top < boxes[i].bottom - 4; j++) {
      const [a, b] = [boxes[i], boxes[j]];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      if (wide > 2 && !a.box.contains(b.box) && !b.box.contains(a.box)) found.push(`${a.text} | ${b.text}`);
    }
  return found;
}"""
UNSTICK = "form.filter, .group h3, thead, .stub, caption span { position: static !important }"


def settled(page):
    """The page with the cell of its address open and everything drawn where it lies."""
    page.add_style_tag(content=UNSTICK + ".cell { content-visibility: visible !important }")
    return page


@pytest.mark.parametrize(
    ("which", "width", "scheme"),
    [("page", 1600, "light"), ("page", 380, "dark"), ("index", 1600, "dark"), ("index", 380, "light")],
)
def test_axe_finds_nothing_serious(visit, sequence_dir, which, width, scheme):
    """WCAG 2.2 A and AA and axe's best practices, with a cell, a comparison and the legend open."""
    folder = sequence_dir if which == "page" else sequence_dir.parent.parent
    page = visit(folder, FAILED if which == "page" else "", width=width, scheme=scheme)
    if which == "page":
        expect(page.locator("details.cell[open]")).to_have_count(1)
        page.evaluate(
            "document.querySelectorAll('.changes details, .matrix > details').forEach((one) => one.open = true)"
        )
        page.locator("details.cell[data-verdict=unproven]").evaluate("cell => cell.open = true")
        expect(page.locator("details.cell[open]")).to_have_count(2)  # of two cells, no two regions have one name
    found = Axe().run(page)
    said = [
        f"{one['id']} ({one['impact']}): {one['nodes'][0]['html'][:200]}"
        for one in found.response["violations"]
        if one["impact"] in ("serious", "critical", "moderate")
    ]
    assert said == []
    assert len(found.response["passes"]) > 15  # it did look


@pytest.mark.parametrize(("width", "scheme"), [(380, "light"), (1600, "dark")])
@pytest.mark.parametrize("which", ["page", "index"])
def test_nothing_overlaps_or_sticks_out(visit, sequence_dir, width, scheme, which):
    folder = sequence_dir if which == "page" else sequence_dir.parent.parent
    page = visit(folder, FAILED if which == "page" else "", width=width, scheme=scheme)
    if which == "page":
        expect(page.locator("details.cell[open]")).to_have_count(1)
        page.evaluate(
            "document.querySelectorAll('.changes details, .matrix > details').forEach((one) => one.open = true)"
        )
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert settled(page).evaluate(OVERLAPS) == []


def test_forced_colours_keep_what_colour_said(visit, sequence_dir):
    page = visit(sequence_dir, FAILED, forced_colors="active")
    expect(page.locator("details.cell[open]")).to_have_count(1)
    told = page.locator("a.square.disagrees").first.evaluate("box => getComputedStyle(box).borderWidth")
    assert told == "3px"
    assert settled(page).evaluate(OVERLAPS) == []
    # a drawn point is not the colour of the page behind it
    assert page.locator("circle.hit").first.evaluate("dot => getComputedStyle(dot).fill") != "rgb(255, 255, 255)"


def test_print_shows_all_and_drops_the_controls(visit, sequence_dir):
    """On A4 across, inside its margins: 297 mm less 24 mm are 1,031 px. From a dark screen it prints on white."""
    page = visit(sequence_dir, FAILED, width=1031, scheme="dark")
    expect(page.locator("details.cell[open]")).to_have_count(1)
    page.emulate_media(media="print")
    expect(page.locator("form.filter")).to_be_hidden()
    expect(page.locator("table.squares").first).to_be_visible()
    box = page.evaluate(
        "(({maxHeight, overflow}) => [maxHeight, overflow])(getComputedStyle(document.querySelector('.matrix .wide')))"
    )
    assert box == ["none", "visible"]
    folded = page.locator("details.idle table.squares")
    assert folded.count() == 2 and folded.last.is_visible()
    wide = page.locator("table.squares").evaluate_all("all => all.map((table) => table.getBoundingClientRect().right)")
    assert len(wide) >= 4 and max(wide) <= 1031
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 30, 34)"
    assert settled(page).evaluate(OVERLAPS) == []


def test_every_control_has_a_name_and_a_visible_focus(visit, sequence_dir):
    page = visit(sequence_dir)
    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''"))
        width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert width != "0px", seen[-1]
    assert all(seen)
