"""The page in real Chromium: filters, deep links, hostile text, packed bodies, narrow and wide screens."""

import re
from collections import Counter

import examples
import pytest
from playwright.sync_api import expect

from harness import report
from harness.report.square import column_of
from harness.report.text import fragment
from harness.verdict import Verdict

pytestmark = pytest.mark.browser
FAILED = next(one.cell.id for one in examples.results() if one.verdict == "fail")


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


def test_every_axis_can_be_filtered(visit, run_dir):
    page = visit(run_dir)
    page.click("details.more summary")
    page.select_option("[name=tp]", "4")
    page.select_option("[name=comm]", "a2a")
    page.select_option("[name=suite]", "helix-gqa")
    four = [one for one in examples.results() if one.cell.tp == 4 and one.cell.comm == "a2a"]
    count = sum("helix-gqa" in one.suites for one in four)
    expect(page.locator("output")).to_have_text(f"{count} of 32 cells")
    assert count == 5
    again = visit(run_dir, page.url.split("#")[1])
    expect(again.locator("output")).to_have_text("5 of 32 cells")
    expect(again.locator("[name=tp]")).to_be_visible()


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


def test_tab_and_enter_lead_from_a_square_to_its_cells(visit, run_dir):
    page = visit(run_dir)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('a.square.v-fail')"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("output")).to_have_text("2 of 32 cells")
    expect(page.locator("details.cell:visible").first).to_be_in_viewport()


def test_copy_takes_the_whole_line_and_says_so(visit, run_dir):
    page = visit(run_dir, fragment(cell=FAILED))
    button = page.get_by_role("button", name="Copy the line that runs the cell again")
    button.click()
    expect(page.locator("details.cell[open] .copy").first).to_have_text(re.compile("Copied|Selected"))
    assert page.evaluate("getSelection().toString()").strip() == f"./test_helix.sh --cell {FAILED}"


def test_a_cell_tells_its_command_versions_image_and_proof_of_every_rank(visit, run_dir):
    body = visit(run_dir, fragment(cell=FAILED)).locator("details.cell[open] .body")
    command = body.locator("pre").nth(1).text_content()
    assert command.startswith("vllm serve nvidia/Llama-3.1-Nemotron-Nano-8B-v1 --tensor-parallel-size 8")
    assert "--decode-context-parallel-size 2 --helix-mode --attention-backend FLASH_ATTN" in command
    facts = dict(
        body.locator("dl.facts")
        .last.locator("div")
        .evaluate_all("all => all.map((one) => [one.children[0].textContent, one.children[1].textContent])")
    )
    assert facts["vllm"] == "0.32.0" and facts["torch"] == "2.13.0" and facts["helix"] == "0.1.0+g04d67aa"
    assert facts["image digest"] == "none: processes of the host"
    rows = body.locator(".proof tbody tr").evaluate_all(
        "rows => rows.map((row) => [...row.cells].slice(0, 4).map((cell) => cell.textContent))"
    )
    # rank, TPA rank, KVP rank, its exchange group: KVP ranks are consecutive
    assert rows == [
        [str(rank), str(rank // 2), str(rank % 2), f"{rank // 2 * 2}, {rank // 2 * 2 + 1}"] for rank in range(8)
    ]


def test_hostile_text_is_text(visit, hostile_dir):
    page = visit(hostile_dir, fragment(cell=examples.hostile().cell.id))
    expect(page.locator("details.cell[open]")).to_have_count(1)
    page.click("details.cell[open] .unpack")
    expect(page.locator("details.cell[open] .log")).to_contain_text("</script><script>window.pwned")
    expect(page.locator("details.cell[open] .said")).to_have_text('"</script><script>window…"')
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 1 and page.locator("img").count() == 0


def test_packed_bodies_open(visit, tmp_path):
    report.write(examples.write_ledger(tmp_path, [*examples.many(130), examples.hostile()]))
    page = visit(tmp_path, fragment(cell=examples.hostile().cell.id))
    body = page.locator("details.cell[open] .body")
    expect(body).to_contain_text("Run just this cell again")
    expect(body).to_contain_text("Proof of path")
    assert page.evaluate("window.pwned") is None


def test_the_matrix_in_the_browser_equals_the_ledger(visit, run_dir):
    """Every square's words, by accessible table cells, against a count of the ledger's own records."""
    page = visit(run_dir)
    page.click("details.idle summary")  # hardware on which nothing ran
    shown = page.evaluate("""() => [...document.querySelectorAll("table.squares[data-by=backend]")].flatMap((table) => {
      const hardware = [...table.tHead.rows[0].cells].slice(1).map((cell) => cell.firstChild.textContent);
      const modes = [...table.tHead.rows[1].cells].map((cell) => cell.innerText);
      return [...table.tBodies[0].rows].flatMap((row) => [...row.cells].slice(1).map((cell, place) => [
        table.dataset.kind, row.cells[0].textContent, hardware[Math.floor(place / 3)], modes[place],
        cell.querySelector(".verdict")?.innerText, cell.querySelector(".count")?.innerText])).filter((one) => one[4]);
    })""")
    ledger = {}
    for one in examples.results():
        if not one.cell.fault:
            kind = "MLA" if "MLA" in one.cell.backend else "GQA"
            place = (kind, one.cell.backend, one.cell.hardware, column_of(one.cell))
            ledger.setdefault(place, []).append(one.verdict)
    assert {tuple(found[:4]) for found in shown} == set(ledger)
    for *place, verdict, count in shown:
        behind = ledger[tuple(place)]
        assert verdict in behind
        assert count.split(":")[0] == f"{len(behind)} cell{'s' if len(behind) > 1 else ''}"
        said = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", count.partition(":")[2])}
        assert said in ({}, dict(Counter(map(str, behind))))


def test_first_paint_says_what_changed_and_shouts_xpass(visit, sequence_dir):
    page = visit(sequence_dir, width=1600, height=1000)
    expect(page.locator("h1")).to_be_in_viewport()
    expect(page.locator(".shout")).to_be_in_viewport()
    expect(page.locator(".shout h2")).to_have_text("XPASS: a known limitation is gone. Update the declared table.")
    expect(page.locator(".comparison .sum")).to_have_text(
        "1 known limitation gone, 1 could no longer be judged; 22 as before."
    )
    expect(page.locator(".comparison .sum")).to_be_in_viewport()
    expect(page.locator("#news")).to_be_in_viewport()
    expect(page.locator("table.squares thead").first).to_be_in_viewport()


def test_on_a_small_laptop_a_bad_day_still_shows_the_matrix_on_the_first_screen(visit, sequence_dir):
    """1366 x 768 with a limitation gone, five cells that differ and a comparison above it: two rows' worth is seen."""
    page = visit(sequence_dir, width=1366, height=768)
    for part in (".shout", "#news", ".comparison .sum", "a.square.v-pass"):
        expect(page.locator(part).first).to_be_in_viewport(ratio=1)
    assert page.locator("table.squares").first.bounding_box()["y"] < 640
    # what stands left and right is said in the same words
    told = page.locator(".comparison .moves .model").first.inner_text()
    assert told == page.locator(".shout .model").inner_text()
    assert told.startswith("nvidia/Llama-3.1-Nemotron-Nano-8B-v1 · TP 8 · KVP 2 · TPA 4 · a2a · interleave 1")
    assert told.endswith("max-model-len=4096 block-size=16")


def test_a_phone_shows_all_three_modes_of_the_first_hardware(visit, sequence_dir):
    page = visit(sequence_dir, width=380)
    box = page.locator(".matrix .wide").first.bounding_box()
    helix = page.locator("table.squares").first.locator("tbody tr").first.locator("td").nth(2).bounding_box()
    assert helix["x"] + helix["width"] <= box["x"] + box["width"]
    index = visit(sequence_dir.parent.parent, width=380)
    runs = index.locator("table.runs").nth(0)
    assert runs.evaluate("table => table.scrollWidth") <= 380
    expect(runs.locator("tbody .verdict").first).to_be_in_viewport()


def test_another_run_is_compared_in_the_page_and_kept_in_the_address(visit, sequence_dir):
    page = visit(sequence_dir)
    page.select_option("select.against", "2026-11-21-smoke")
    moves = page.locator(".comparison .moves li")
    expect(moves).to_have_count(5)
    page.click(".comparison summary")  # two of them stand in front
    assert moves.locator(".fromto").all_inner_texts() == [
        "pass\n→\nbecame\nfail", "pass\n→\nbecame\nflaky", "pass\n→\nbecame\nunproven", "xfail\n→\nbecame\nxpass",
        "fail\n→\nbecame\npass",
    ]  # fmt: skip
    assert "against=2026-11-21-smoke" in page.url
    again = visit(sequence_dir, page.url.split("#")[1])
    expect(again.locator(".comparison .sum")).to_contain_text("3 worse, 1 known limitation gone, 1 better")
    again.select_option("select.against", "2026-11-22-smoke")
    expect(again.locator(".comparison .sum")).to_contain_text("22 as before")
    again.click(".comparison .moves a")
    expect(again.locator("details.cell[open]")).to_have_attribute("data-verdict", "xpass")


def test_a_deep_link_survives_a_new_run_and_a_cell_shows_its_past(visit, sequence_dir):
    address = fragment(cell=FAILED)
    first = visit(sequence_dir.parent / "2026-11-21-smoke", address)
    expect(first.locator("details.cell[open] summary .verdict")).to_have_text("pass")
    last = visit(sequence_dir, address)
    opened = last.locator("details.cell[open]")
    expect(opened.locator("summary .verdict")).to_have_text("fail")
    expect(opened.locator(".good-bad")).to_have_text("First bad: 2026-11-22-smoke. Last good: 2026-11-21-smoke.")
    opened.locator(".past a").first.click()
    expect(last.locator("h1")).to_have_text("2 cells differ from what is declared")
    expect(last.locator("details.cell[open] summary .verdict")).to_have_text("pass")


def test_sorting_is_in_the_address_and_goes_back(visit, run_dir):
    page = visit(run_dir)
    before = page.locator("details.cell").evaluate_all("cells => cells.map((cell) => cell.dataset.id)")
    page.select_option("[name=sort]", "verdict")
    words = page.locator("details.cell:visible summary .verdict").all_text_contents()
    # a rejection that nobody declared differs; declared ones come after every pass
    assert words[:6] == ["fail", "flaky", "rejected", "unproven", "xpass", "error"]
    assert words[-7:] == ["stale", *["skip"] * 6]
    expect(page.locator("details.cell:visible .place").first).to_have_text("FLASH_ATTN · Helix · hopper")
    page.select_option("[name=verdict]", "pass")
    again = visit(run_dir, page.url.split("#")[1])
    expect(again.locator("output")).to_have_text("14 of 32 cells")
    again.select_option("[name=sort]", "kv")
    ratios = again.locator("details.cell:visible").evaluate_all(
        "all => all.map((one) => one.dataset.order.split(' ')[1])"
    )
    known = [float(ratio) for ratio in ratios if ratio != "-"]
    assert known == sorted(known) and ratios[len(known) :] == ["-"] * (len(ratios) - len(known))
    again.click("button[type=reset]")
    expect(again.locator("output")).to_have_text("32 cells")  # the page follows a moment after the form
    after = again.locator("details.cell").evaluate_all("cells => cells.map((cell) => cell.dataset.id)")
    assert after == before


def test_headings_stick_while_their_rows_are_read(visit, run_dir):
    page = visit(run_dir, height=500)
    heading = page.locator("h3", has_text="CPU_ATTN · Helix · cpu")
    heading.scroll_into_view_if_needed()
    page.locator("section.group").filter(has=heading).locator("details.cell").last.scroll_into_view_if_needed()
    bar, head = page.locator("form.filter").bounding_box(), heading.bounding_box()
    assert bar["y"] == 0 and head["y"] == pytest.approx(bar["height"], abs=1)
    page.set_viewport_size({"width": 1400, "height": 220})
    matrix = page.locator(".matrix .wide").nth(1)
    matrix.evaluate("box => box.scrollTo(0, 9999)")
    top, head = matrix.bounding_box(), matrix.locator("thead").bounding_box()
    assert head["y"] == pytest.approx(top["y"], abs=1)


def test_planted_differences_and_numbers_are_drawn(visit, run_dir):
    page = visit(run_dir, fragment(cell=FAILED))
    body = page.locator("details.cell[open] .body")
    curve = body.locator("svg.plot").first
    expect(curve).to_have_attribute(
        "aria-label",
        "KL of decode by position, 5 ranges. Worst step 6e-05 nat, at positions 1024 to 4095, where the null band ends "
        "at 1e-05 nat",
    )
    assert curve.locator(".miss.beyond").count() == 5 and curve.locator(".band").count() == 5
    expect(body.locator("table.step caption").first).to_contain_text("the best tokens differ, first here")
    first = body.locator("table.step").first.locator("tbody tr").first
    assert first.locator("td").all_text_contents() == [
        '"\\n\\n" 271', "-0.8123", '"\\n" 198', "-0.6100", "+0.5940",
    ]  # fmt: skip
    told = body.locator("table.step").first.locator("tbody td:first-child").all_text_contents()
    assert told[2:] == ['" <b>" 4097', '"0" 15', f'"{"a" * 23}…" 902']
    assert body.locator("table.step").first.locator("tbody td:nth-child(3)").last.text_content() == "7733"
    times = body.locator("table.phases tbody tr").nth(1).locator("th, td").all_text_contents()
    assert times[:3] == ["start", "29.4 s", "29.4 s"]
    expect(body.get_by_text("2.00 × the baseline's")).to_be_visible()
    expect(body.get_by_text("./test_helix.sh --cell")).to_be_visible()


def test_hostile_text_in_comparisons_and_index_is_text(visit, tmp_path):
    hostile = examples.hostile()
    for day, verdict in (("20", "xfail"), ("21", "pass"), ("22", "xpass")):
        found = [hostile.model_copy(update={"verdict": Verdict(verdict), "declared": Verdict.XFAIL})]
        folder = tmp_path / "runs" / f"{day}'><img src=x onerror=pwned=1>"
        report.write(examples.write_ledger(folder, found, name=examples.HOSTILE, started=f"2026-11-{day}"))
    report.index(tmp_path)
    page = visit(folder.as_posix().replace("<", "%3C").replace(">", "%3E"))
    expect(page.locator(".shout")).to_contain_text("</script>")
    page.locator("select.against").select_option(index=1)
    expect(page.locator(".comparison .sum")).to_contain_text("1 known limitation gone")
    index = visit(tmp_path)
    expect(index.locator("table.grid tbody tr")).to_have_count(1)
    for one in (page, index):
        assert one.evaluate("window.pwned") is None
        assert one.locator("script").count() == 1 and one.locator("img").count() == 0


def test_without_its_script_the_page_still_reads(visit, run_dir):
    page = visit(run_dir, java_script_enabled=False)
    expect(page.locator("noscript p")).to_be_visible()
    assert page.locator("details.cell").count() == len(examples.results())
    page.locator("details.cell summary").first.click()
    expect(page.locator("details.cell[open] .body")).to_contain_text("Serve command")


def test_the_index_sorts_by_a_column(visit, sequence_dir):
    page = visit(sequence_dir.parent.parent)
    names = page.locator("section").nth(1).locator("tbody th")
    assert names.all_inner_texts() == [examples.NAME, "2026-11-22-smoke", "2026-11-21-smoke"]
    page.get_by_role("button", name="started").last.press("Enter")
    assert names.all_inner_texts() == ["2026-11-21-smoke", "2026-11-22-smoke", examples.NAME]
    expect(page.locator("section").nth(1).locator("th[aria-sort=ascending]")).to_have_text("started")


def test_the_index_opens(visit, tmp_path):
    report.write(examples.write_ledger(tmp_path / "runs" / "local", examples.results(), name="local"))
    report.index(tmp_path)
    page = visit(tmp_path)
    page.click("text=local >> nth=0")
    expect(page.locator("h1")).to_have_text("5 cells differ from what is declared")
