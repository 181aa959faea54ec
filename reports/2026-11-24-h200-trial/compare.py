"""Compares the JSON of two engines up to the first token at which they part."""

import json
import os
import sys

out = os.environ.get("OUT", ".")


def load(n):
    p = f"{out}/{n}.json"
    return json.load(open(p)) if os.path.exists(p) else None


for pair in sys.argv[1:]:
    a, b = pair.split(":")
    A, B = load(a), load(b)
    if not A or not B:
        print(pair, "missing", bool(A), bool(B))
        continue
    worst = 0
    n = 0
    div = 0
    w0 = 0
    for ra, rb in zip(A["runs"], B["runs"]):
        for pa, pb in zip(ra, rb):
            for i, (x, y) in enumerate(zip(pa, pb)):
                for k, v in x["lp"].items():
                    if k in y["lp"] and v > -8:
                        d = abs(v - y["lp"][k])
                        if i == 0:
                            w0 = max(w0, d)
                        else:
                            worst = max(worst, d)
                n += 1
                if x["t"] != y["t"]:
                    div += 1
                    break
    print(
        f"{pair}: steps {n} diverged {div}/{sum(len(r) for r in A['runs'])} max|dlogprob| prefill {w0:.4f} decode {worst:.4f}"
    )
    if B["proofs"]:
        p = B["proofs"][1]
        print(
            "   ",
            p["impl"],
            p["combine_impl"],
            p["group_size"],
            p["helix"],
            p["self_test"],
            p["model_runner"],
            p["counters"],
        )
