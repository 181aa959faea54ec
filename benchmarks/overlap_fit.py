"""The costs of HOP-B's rule, fitted to measured steps.

    python -m benchmarks.overlap_fit overlap.json [...]

Of all `OverlapCosts` on a coarse grid: those whose choices are at most 1 % slower than no overlap at every size and
exchange measured, of these those that save most in sum, and of these the ones whose predictions are nearest.
"""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

from benchmarks.overlap_table import Group, groups
from benchmarks.records import Results
from helix_runtime.overlap import OverlapCosts, Way, best_way, predicted_us

GRID = {
    "split": (4.0, 8.0, 16.0),
    "start": (3.0, 5.0, 8.0, 12.0, 20.0),
    "contention": (0.1, 0.15, 0.2, 0.3, 0.4, 0.6),
    "slower": (0.01, 0.03, 0.05),
    "late": (0.05, 0.1, 0.15, 0.2, 0.3),
}
WORST = 0.01


@dataclass(frozen=True)
class Fit:
    """Costs, and what their choices change at each group (a share of no overlap's time); error: of the predictions,
    mean square of a share."""

    costs: OverlapCosts
    changes: list[float]
    error: float

    @property
    def order(self) -> tuple:
        """Less is better; sums are rounded, so that noise does not decide against a nearer prediction."""
        return sum(change > WORST for change in self.changes), round(sum(self.changes), 2), self.error


def tried(costs: OverlapCosts, measured: list[Group]) -> Fit:
    changes, errors = [], []
    for group in measured:
        ways, whole = group.ways, group.whole.us
        changes.append(ways[best_way(*group.alone, costs, list(ways))].us / whole - 1)
        errors += [
            (predicted_us(way, *group.alone, costs) / record.us - 1) ** 2
            for way, record in ways.items()
            if way != Way()
        ]
    return Fit(costs, changes, sum(errors) / max(1, len(errors)))


def fitted(measured: list[Group]) -> Fit:
    every = (OverlapCosts(**dict(zip(GRID, values, strict=True))) for values in itertools.product(*GRID.values()))
    return min((tried(costs, measured) for costs in every), key=lambda fit: fit.order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="of benchmarks.overlap")
    options = parser.parse_args()
    measured = [group for path in options.results for group in groups(Results.read(path))]
    for name, fit in (("now", tried(OverlapCosts(), measured)), ("fitted", fitted(measured))):
        print(
            f"{name}: {fit.costs}\n  worst {max(fit.changes):+.2%}, mean {sum(fit.changes) / len(measured):+.2%} of "
            f"{len(measured)}, predictions off by {fit.error**0.5:.1%}"
        )


if __name__ == "__main__":
    main()
