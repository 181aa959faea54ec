"""Ledger in, report out: one page a run, an index over runs, and the same facts for machines.

report.write(run_dir)    run_dir/ledger.ndjson -> index.html, results.json, results.csv, junit.xml, summary.md
report.frame(run_dir)    the run as a pandas DataFrame, one row a cell
report.index(reports)    reports/index.html over the committed evidence and the local runs
"""

from pathlib import Path

import pandas as pd

from harness.report import junit, machine, markdown, page
from harness.report.index import index
from harness.report.run import load
from harness.report.table import tabulate

__all__ = ["frame", "index", "write"]


def write(run_dir: Path) -> Path:
    """Draw the report of one run beside its ledger and return the page's path.

    Never fails on what the ledger holds: a record that cannot be used is named on the page instead.
    """
    run = load(run_dir)
    table = tabulate(run)
    outputs = {
        "results.json": machine.results_json(run, table),
        "results.csv": machine.results_csv(table),
        "junit.xml": junit.junit_xml(run),
        "summary.md": markdown.summary(run, table),
        "index.html": page.render(run, table),
    }
    for name, text in outputs.items():
        scratch = run_dir / f".{name}.tmp"
        scratch.write_text(text, encoding="utf-8", newline="\n")
        scratch.replace(run_dir / name)  # a reader never sees half a page
    return run_dir / "index.html"


def frame(run_dir: Path) -> pd.DataFrame:
    """The run as one table for a notebook: `report.frame(path).pivot_table(index="backend", columns="column", …)`.

    One row a cell; the columns are `harness.report.table.COLUMNS` and `stat:NAME` for each statistic of the oracle.
    """
    return tabulate(load(run_dir))
