"""How fast a large report is built and filtered, and how large it is.

    python benchmarks/report.py [CELLS] [--ledger DIR] [--keep DIR]

The cells are copies of those that ran in the committed CPU evidence (or in DIR), each with an option of its own, so
that logs, proofs and statistics are real. The filter is timed in Chromium at letters of a word and choices of a list.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from harness import ledger, report
from harness.report.run import load
from harness.verdict import Effect

EVIDENCE = Path(__file__).parent.parent / "reports" / "2026-11-26-cpu"
WORDS = ("h", "he", "hel", "helix", "helix-gqa i16", "", "nothing like it", "")
CHOICES = (("verdict", "pass"), ("column", "Helix"), ("column", ""), ("verdict", ""))
#: Milliseconds from the event to the layout that shows its effect, and until all rows far below are right as well.
TIMED = """async ([name, value]) => {
  const field = document.querySelector(`form.filter [name=${name}]`);
  const list = document.getElementById("cells");
  const began = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  document.body.offsetHeight;
  const shown = performance.now() - began;
  while (list.ariaBusy) await new Promise((go) => setTimeout(go));
  document.body.offsetHeight;
  return [shown, performance.now() - began];
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="?", type=int, default=10_000)
    parser.add_argument("--ledger", type=Path, default=EVIDENCE, help="a run whose cells are copied")
    parser.add_argument("--keep", type=Path, help="a new folder for the run instead of a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = options.keep or Path(scratch) / "run"
        make(options.ledger, run_dir, options.cells)
        began, busy = time.perf_counter(), cpu()
        page = report.write(run_dir)
        took, busy = time.perf_counter() - began, cpu() - busy
        size = page.stat().st_size
        each = f"{size / options.cells:,.0f} B a cell"
        print(
            f"{options.cells:,} cells: built in {took:.1f} s ({busy:.1f} s of CPU), page {size / 1e6:.1f} MB ({each})"
        )
        time_filter(page)


def cpu() -> float:
    """Seconds of CPU that this process and its children have taken."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def make(source: Path, run_dir: Path, count: int) -> None:
    """A ledger of `count` different cells, copies of those of `source` that ran."""
    ran = [one for one in load(source).results if one.effect is not Effect.NEUTRAL]
    run_dir.mkdir(parents=True)
    with (run_dir / ledger.NAME).open("w") as stream:
        start = {"event": "run-start", "run": "benchmark", "time": ledger.now(), "planned": []}
        stream.write(json.dumps(start) + "\n")
        for number in range(count):
            one = ran[number % len(ran)]
            cell = one.cell.model_copy(update={"serve": (*one.cell.serve, ("copy", number))})
            record = one.model_copy(update={"cell": cell}).model_dump(mode="json")
            stream.write(json.dumps({"event": "result", "result": record}) + "\n")


def time_filter(page: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        print("filter: no Chromium on this host")
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless=new", "--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1600, "height": 1000})
        began = time.perf_counter()
        tab.goto(page.absolute().as_uri())
        opened = time.perf_counter() - began
        steps = [("text", word) for word in WORDS] + list(CHOICES)
        times = [tab.evaluate(TIMED, list(step)) for _ in range(3) for step in steps]
        shown, settled = zip(*times, strict=True)
        first = f"shown after a median of {statistics.median(shown):.0f} ms, most {max(shown):.0f}"
        rest = f"all rows after {statistics.median(settled):.0f} ms, most {max(settled):.0f}"
        print(f"opened in {opened:.1f} s; filter, {len(times)} inputs: {first}; {rest}")
        browser.close()


if __name__ == "__main__":
    main()
