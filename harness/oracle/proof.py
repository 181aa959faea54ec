"""Did the claimed path run? Without that, equal answers prove nothing: a silent fallback answers rightly too."""

from collections.abc import Sequence

from harness.cell import CUDA_GRAPHS, Cell, Mode
from helix_runtime.proof import RankProof


def check_proof(cell: Cell, proofs: Sequence[RankProof], longest: int = 0) -> str | None:
    """None when the workers' records prove the cell's claim, else what is missing, in one sentence.

    `longest`: tokens of the longest sequence whose KV was written, as the transcript tells; 0 where nobody knows.
    """
    missing = sorted(set(range(cell.tp)) - {proof.rank for proof in proofs})
    if missing:
        return f"no proof of path from rank {', '.join(map(str, missing))} of {cell.tp}"
    combine = wanted_combine(cell)
    for proof in proofs:
        claims = (
            ("TP", proof.tp, cell.tp),
            ("KVP", proof.kvp, cell.kvp),
            ("TPA", proof.tpa, cell.tpa if cell.mode.helix else proof.tpa),
            ("Helix", proof.helix, cell.mode.helix),
            ("interleave", proof.interleave, cell.interleave),
            ("combine", proof.combine, combine),
            ("group size", proof.group_size, cell.kvp),
            ("size of the group's rank list", len(set(proof.group_ranks)), cell.kvp),
            ("self-test", proof.self_test, "ok"),
            ("backend", proof.backend, cell.backend if cell.backend != "auto" else proof.backend),
            ("vLLM version", proof.vllm_version.split("+")[0], cell.vllm_version),
            ("combine's function", bool(proof.combine_impl), True),
            ("replication of queries", proof.q_replicated, dict(cell.serve).get("dcp-q-replicate") is True),
        )
        for what, ran, claimed in claims:
            if ran != claimed:
                return f"rank {proof.rank}: {what} was {ran}, the cell claims {claimed}"
        if dict(cell.helix).get("combine", "auto") != "auto" and "fell back" in proof.combine_impl:
            return f"rank {proof.rank}: the combine was {proof.combine_impl}, the cell asks for another"
        if not proof.impl:
            return f"rank {proof.rank} does not name the attention class that ran"
        counters = ["decode_attention", *(["decode_combine"] if cell.kvp > 1 else [])]
        for counter in counters:
            if proof.counters.get(counter, 0) <= 0:
                return f"rank {proof.rank}: {counter} is 0: the path never ran during decode"
        # Every hooked backend merges each decode batch of each layer; a batch without any context is no decode.
        attended, combined = (proof.counters.get(name, 0) for name in ("decode_attention", "decode_combine"))
        if cell.kvp > 1 and attended != combined:
            return f"rank {proof.rank}: {combined} combines ran for {attended} decode attentions: some were not merged"
        if cell.kvp > 1 and longest > proof.interleave * proof.kvp_rank and not proof.counters.get("local_tokens", 0):
            return f"rank {proof.rank} holds no token, though a sequence had {longest}: others hold its share"
        if dict(cell.helix).get("overlap", 1) > 1 and not proof.counters.get("overlapped_combine", 0):
            return f"rank {proof.rank}: no combine ran beside the next micro-batch's attention, the cell asks for it"
        if other := _graphs(cell, proof):
            return f"rank {proof.rank}: {other}"
        if cell.hardware == "cpu" and cell.kvp > 1 and (other := _exchanges(proof, combine)):
            return f"rank {proof.rank}: {other}"
    return _ownership(proofs)


#: The collectives of each combine, by the name of their counter.
EXCHANGES = {"a2a": ("all_to_all",), "ag_rs": ("all_gather", "reduce_scatter")}


def _exchanges(proof: RankProof, combine: str) -> str | None:
    """None when the collectives that were really called are those of the claimed combine, one of each a combine."""
    counts = proof.counters
    combines = counts.get("decode_combine", 0) + counts.get("prefill_combine", 0)
    wanted = {name: combines for name in EXCHANGES[combine]}
    for name in (name for names in EXCHANGES.values() for name in names):
        if counts.get(name, 0) != wanted.get(name, 0):
            return (
                f"{counts.get(name, 0)} {name} exchanges ran where {combine} makes {wanted.get(name, 0)}: "
                f"another combine answered, or none"
            )
    calls, members = combines * len(wanted), counts.get("exchange_members", 0)
    if members != calls * proof.kvp:
        return f"{calls} exchanges ran among {members} members in all, not among {proof.kvp} each"
    return None


def _graphs(cell: Cell, proof: RankProof) -> str | None:
    """None when CUDA graphs ran as far as the cell asks for them. PIECEWISE ones leave attention outside."""
    asked = dict(cell.serve).get(CUDA_GRAPHS)
    if asked in (None, "NONE"):
        return None
    full = str(asked).startswith("FULL")
    if proof.cudagraph_mode in ("", "NONE") or (full and not proof.cudagraph_mode.startswith("FULL")):
        return f"vLLM settled on CUDA graphs {proof.cudagraph_mode or 'unknown'}, the cell asks for {asked}"
    if not proof.graphs_captured:
        return f"no CUDA graph was captured, the cell asks for {asked}"
    if full and cell.kvp > 1 and not proof.counters.get("replayed_combine", 0):
        return f"no combine ran in a replay of a CUDA graph, the cell asks for {asked}"
    return None


def wanted_combine(cell: Cell) -> str:
    """The combine that a cell asks for; without asking, All-to-All for Helix and vLLM's own default for DCP."""
    if cell.kvp == 1:
        return "none"
    return cell.comm or ("a2a" if cell.mode is not Mode.STANDARD_DCP else "ag_rs")


def _ownership(proofs: Sequence[RankProof]) -> str | None:
    """Every token that passed must lie on exactly one rank of each group."""
    by_rank = {proof.rank: proof for proof in proofs}
    for group in sorted({proof.group_ranks for proof in proofs}):
        if any(rank not in by_rank for rank in group):
            return f"group {list(group)} names a rank that wrote no proof"
        owned = sum(by_rank[rank].counters.get("local_tokens", 0) for rank in group)
        for rank in group:
            passed = by_rank[rank].counters.get("global_tokens", 0)
            if passed <= 0:
                return f"rank {rank}: no token passed its KV update"
            if wrong := by_rank[rank].counters.get("misplaced_tokens", 0):
                return f"rank {rank}: {wrong} tokens lie on another rank than the interleave names"
            if owned != passed:
                return f"group {list(group)} owns {owned} tokens, but {passed} passed rank {rank}"
    return None
