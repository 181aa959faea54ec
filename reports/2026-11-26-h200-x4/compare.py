"""What stock FLASHINFER answered wrongly: the transcripts beside this file, step by step, up to where tokens part.

Of each pair, the steps where a token that both servers name changed by more than LIMIT nat, or where they name none in
common, and then what every other server of that model said of the very same prefix. Plain Python: `python compare.py`.
"""

import json
import tarfile
from pathlib import Path

LIMIT = 1.0
PAIRS = (
    ("tp4-full", "tp4-full-again"),
    ("tp4-full", "helix-full"),
    ("tp4-full-and-piecewise", "tp4-full-and-piecewise-again"),
    ("tp4-eager", "tp4-eager-again"),
    ("tp4-eager", "helix-eager"),
    ("one-head-tp4-full-and-piecewise", "one-head-tp4-full-and-piecewise-again"),
    ("one-head-tp4-full-and-piecewise", "one-head-tp1-full-and-piecewise"),
)


def load():
    with tarfile.open(Path(__file__).parent / "flashinfer-transcripts.tar.xz") as tar:
        return {
            Path(name).stem: {answer["prompt"]: answer["steps"] for answer in json.load(tar.extractfile(name))["answers"]}
            for name in tar.getnames()
        }


def change(one, other):
    common = one["top"].keys() & other["top"].keys()
    return max((abs(one["top"][token] - other["top"][token]) for token in common), default=float("inf"))


def prefix(steps, number):
    return [step["token_id"] for step in steps[:number]]


runs = load()
for first, second in PAIRS:
    shared = wrong = 0
    lines = []
    for prompt, steps in runs[first].items():
        for number, (one, other) in enumerate(zip(steps, runs[second][prompt])):
            shared += 1
            if change(one, other) > LIMIT:
                wrong += 1
                told = [
                    f"{name} {change(one, run[prompt][number]):.2f}/{change(other, run[prompt][number]):.2f}"
                    for name, run in runs.items()
                    if name not in (first, second) and name.startswith("one-head") == first.startswith("one-head")
                    and prefix(run[prompt], number) == prefix(steps, number)
                ]  # fmt: skip
                lines.append(f"    {prompt} step {number}: {change(one, other):.2f}; to both: {', '.join(told) or '-'}")
            if one["token_id"] != other["token_id"]:
                break
    print(f"{first} / {second}: {wrong} of {shared} steps", *lines, sep="\n")
