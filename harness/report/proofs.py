"""Proof of path for a reader: what is the same on every rank once, and a table of what differs between ranks."""

from dataclasses import dataclass

from markupsafe import Markup

from harness.report.text import definitions, table_row

#: Order and headings of the proof's columns; fields that are not named here come after, under their own name.
_HEADINGS = {
    "rank": "rank",
    "tpa_rank": "TPA rank",
    "kvp_rank": "KVP rank",
    "group_ranks": "exchange group",
    "backend": "backend",
    "impl": "attention",
    "combine": "combine",
    "combine_impl": "combined by",
    "group_size": "group size",
    "tp": "TP",
    "kvp": "KVP",
    "tpa": "TPA",
    "helix": "Helix",
    "interleave": "interleave",
    "lse_base": "LSE base",
    "self_test": "self-test",
    "model_runner": "model runner",
    "vllm_version": "vLLM",
    "decode_attention": "decode attention calls",
    "decode_combine": "decode combines",
    "prefill_attention": "prefill attention calls",
    "prefill_combine": "prefill combines",
    "empty_shard": "empty shards",
    "local_tokens": "KV tokens here",
    "global_tokens": "KV tokens seen",
    "misplaced_tokens": "KV tokens on the wrong rank",
    "context_prefill": "prefills over context",
    "all_to_all": "All-to-Alls",
    "all_gather": "AllGathers",
    "reduce_scatter": "ReduceScatters",
    "exchange_members": "members of these groups, summed",
    "on_device": "counted on the device",
}
#: Always a column, also where all ranks agree: a rank that ran no combine must be seen at once.
_ALWAYS = {"rank", "tpa_rank", "kvp_rank", "group_ranks", "decode_attention", "decode_combine", "local_tokens"}


@dataclass(frozen=True)
class Proof:
    common: Markup  # of a definition list: what all ranks have alike
    head: list[str]
    rows: list[Markup]  # the cells of a row


def proof_of(ranks: tuple[dict, ...]) -> Proof | None:
    """From `CellResult.proof`; None where no worker wrote one."""
    if not ranks:
        return None
    flat = []
    for rank in ranks:
        counters = rank.get("counters")
        own = {
            str(name): _word(value) for name, value in rank.items() if name != "counters" or not isinstance(value, dict)
        }
        flat.append({**own, **({str(n): _word(v) for n, v in counters.items()} if isinstance(counters, dict) else {})})
    named = {name for rank in flat for name in rank}
    names = [name for name in _HEADINGS if name in named] + sorted(named - _HEADINGS.keys())
    column = {name: [rank.get(name, "–") for rank in flat] for name in names}
    table = [name for name in names if name in _ALWAYS or len(set(column[name])) > 1]
    return Proof(
        common=definitions([(_HEADINGS.get(name, name), column[name][0]) for name in names if name not in table]),
        head=[_HEADINGS.get(name, name) for name in table],
        rows=[table_row([column[name][index] for name in table]) for index in range(len(flat))],
    )


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value)
