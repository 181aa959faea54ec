"""Bench cells: a served cell and its standard-TP baseline under the same load, round against round, in one run.

The load is `vllm bench serve`'s. `spec` is what a suite asks, `measure` runs it, `result` is what came out.
"""
