"""Fill the tables of Markdown files from the committed results, so that no figure is copied by hand.

    python -m benchmarks.tables [--check] [FILE ...]

A table stands between `<!-- table KIND RESULTS -->` and `<!-- end -->`; KIND is one of `TABLES`, RESULTS a file of
`benchmarks/results/`. `--check` changes nothing and exits 1 where a table differs from its results.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import attention, combine, exchange, hop_b, overlap_table, step
from benchmarks.records import Results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = (ROOT / "benchmarks" / "README.md", ROOT / "docs" / "kernels.md")
_BLOCK = re.compile(r"(<!-- table (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def merges(path: Path) -> str:
    """Markdown: every merge of the combine side by side, in microseconds."""
    columns = ["ours", "ours_lse", "vllm", "flashinfer", "torch_compiled", "torch"]
    heads = ["ours", "ours with LSE", "vLLM", "FlashInfer `merge_states`", "`torch.compile`d", "torch"]
    lines = [f"| size | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
    for row in _rows(path):
        if row["operation"] == "combine":
            times = [f"{row['us'][name][0]:.2f}" if name in row["us"] else "–" for name in columns]
            lines.append(f"| {row['case']} | {' | '.join(times)} |")
    return "\n".join(lines)


#: KIND -> the Markdown of a results file.
TABLES: dict[str, Callable[[Path], str]] = {
    "combine": lambda path: combine.table(_rows(path)),
    "combine-alone": lambda path: combine.table_alone(_rows(path)),
    "merges": merges,
    "attention": lambda path: attention.table(Results.read(path)),
    "overlap": lambda path: overlap_table.table(Results.read(path)),
    "hop_b": lambda path: hop_b.table(Results.read(path)),
    "exchange": lambda path: exchange.table(Results.read(path)),
    "step": lambda path: step.table(Results.read(path)),
}


def filled(text: str) -> str:
    """`text` with every table made from its results."""

    def fill(found: re.Match) -> str:
        opening, kind, name, closing = found.groups()
        return f"{opening}{TABLES[kind](RESULTS / name)}\n{closing}"

    return _BLOCK.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say which files differ, change none")
    parser.add_argument("files", nargs="*", type=Path, default=list(FILES))
    options = parser.parse_args()
    differ = [path for path in options.files if filled(path.read_text()) != path.read_text()]
    for path in differ:
        if not options.check:
            path.write_text(filled(path.read_text()))
        print(f"{path}: {'differs from its results' if options.check else 'written'}")
    sys.exit(1 if options.check and differ else 0)


if __name__ == "__main__":
    main()
