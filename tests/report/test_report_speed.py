"""A large report takes as much more work as it has more cells: the benchmark's own run, measured in CPU time."""

import importlib.util

import pytest

from harness import report
from harness.suite import ROOT


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_four_times_the_cells_cost_no_more_than_five_times_the_cpu(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "report.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    busy = {}
    for count in (50, 500, 2000):  # the first one warms up: templates are compiled once
        benchmark.make(benchmark.EVIDENCE, tmp_path / str(count), count)
        began = benchmark.cpu()
        page = report.write(tmp_path / str(count))
        busy[count] = benchmark.cpu() - began
        text = page.read_text()
        assert text.count('<details class="cell') == count
        assert len(text) < 7000 * count + 500_000  # the bodies are packed
    assert busy[2000] < 5 * busy[500], busy
