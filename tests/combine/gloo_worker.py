"""Both combines over a real gloo group of `world` processes. `python gloo_worker.py WORLD FOLDER`; exit 0 if all hold.

torch is imported once and the ranks are forked from here, so that eight of them start in a moment.
"""

import math
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from helix_runtime.attention import ReferenceAttention
from helix_runtime.combine import COMBINES, DIST, all_to_all_combine, merge_partials
from helix_runtime.overlap import ThreadLanes, micro_batches, overlapped
from helix_runtime.sharding import local_lengths

sys.path.insert(0, str(Path(__file__).parents[1] / "attention"))
from paged_shards import Batch

INF = float("inf")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random_partials(seed, members, tokens, heads, dim, dtype, empty):
    """All members' partials, the same on every rank: outputs [N, B, H, D], lses [N, B, H]. Empty ones hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(members, tokens, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    lses = 4 * torch.randn(members, tokens, heads, generator=generator)
    gone = torch.rand(lses.shape, generator=generator) < empty
    return outputs.masked_fill(gone[..., None], float("nan")), lses.masked_fill(gone, -INF)


def expected_merge(outputs, lses, base):
    """fp64, by softmax over the members."""
    natural = lses.double() * (math.log(2) if base == "2" else 1.0)
    alive = (lses > -INF).any(0)
    weights = natural.masked_fill(~alive, 0.0).softmax(0).masked_fill(lses == -INF, 0.0)
    output = (outputs.double().masked_fill((lses == -INF)[..., None], 0.0) * weights[..., None]).sum(0)
    return output, natural.logsumexp(0).masked_fill(~alive, -INF)


def check_random_shapes(group, members, me, cases):
    for case in range(cases):
        draw = random.Random(1000 * members + case)
        tokens, per_member, dim = draw.choice([0, 1, 3, 17]), draw.randint(1, 3), draw.choice([1, 5, 8, 64, 127])
        dtype, base = draw.choice(list(TOLERANCE)), draw.choice("e2")
        empty = draw.choice([0.0, 0.3, 0.9, 1.0])
        outputs, lses = random_partials(case, members, tokens, members * per_member, dim, dtype, empty)
        mine = slice(me * per_member, (me + 1) * per_member)
        expected, expected_lse = (part[:, mine] for part in expected_merge(outputs, lses, base))
        for name, combine in COMBINES.items():
            note = f"{name}, case {case}: {tuple(outputs.shape)} {dtype} base {base} empty {empty}"
            output, lse = combine(outputs[me], lses[me], group, lse_base=base, return_lse=True)
            assert output.dtype == dtype and output.shape == (tokens, per_member, dim), note
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(
                output.double(), expected, atol=tolerance, rtol=tolerance, msg=lambda text, note=note: f"{note}\n{text}"
            )
            # fp64 outputs come with fp32 lses here: the sum is fp64, so only base 2's product is rounded to fp32.
            torch.testing.assert_close(
                lse.double(), expected_lse, atol=1e-5, rtol=1e-6, msg=lambda text, note=note: f"{note}\n{text}"
            )
            assert torch.equal(combine(outputs[me], lses[me], group, lse_base=base), output), note
        # The exchange moves bits and merges in group order, so the result is the local merge bit for bit.
        local, _ = merge_partials(outputs[:, :, mine], lses[:, :, mine], base)
        assert torch.equal(all_to_all_combine(outputs[me], lses[me], group, lse_base=base), local), f"case {case}"


def check_attention(group, members, me, cases):
    """Full attention == shards by interleave, a partial a rank, combined."""
    for case in range(cases):
        draw = random.Random(77 * members + case)
        interleave = draw.choice([1, 2, 16])
        block_size = interleave * draw.choice([1, 2])
        lengths = [draw.choice([1, 2, members, interleave, interleave * members + 1, 61]) for _ in range(3)]
        new = [draw.choice([1, length, (length + 1) // 2]) for length in lengths]
        kv_heads = draw.choice([1, members])
        batch = Batch.random(case, lengths, new, heads=2 * members, kv_heads=kv_heads)
        output, lse = ReferenceAttention(members, me, interleave, batch.scale).partial(
            batch.query,
            batch.kv_cache(members, me, interleave, block_size),
            batch.block_table(members, block_size),
            local_lengths(batch.seq_lens, members, me, interleave),
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
        )
        expected, expected_lse = (part[:, 2 * me : 2 * me + 2] for part in batch.dense())
        for combine in COMBINES.values():
            found, found_lse = combine(output, lse, group, return_lse=True)
            torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(found_lse.double(), expected_lse, atol=2e-5, rtol=2e-5)


def check_faults_show(group, members, me):
    """A wrapped exchange or merge changes the answer: the checks above can fail, and the seam reaches the bytes."""
    outputs, lses = random_partials(5, members, 4, members * 2, 8, torch.float32, 0.0)
    right = all_to_all_combine(outputs[me], lses[me], group)

    def swapped(output, input, *, group):
        DIST.all_to_all(output, input[[1, 0, *range(2, members)]], group=group)

    def dropped(outputs, lses, base):
        return merge_partials(outputs[1:], lses[1:], base)

    def stale(outputs, lses, base):
        return merge_partials(outputs, lses.roll(1, 1), base)

    def gathered_without_one(output, input, *, group):
        DIST.all_gather(output, input, group=group)
        output[1] = -INF

    faults = {
        "swapped chunks": all_to_all_combine(
            outputs[me], lses[me], group, collectives=DIST._replace(all_to_all=swapped)
        ),
        "dropped shard": all_to_all_combine(outputs[me], lses[me], group, merge=dropped),
        "stale lse": all_to_all_combine(outputs[me], lses[me], group, merge=stale),
        "wrong base": all_to_all_combine(outputs[me], lses[me], group, lse_base="2"),
        "dropped shard, ag_rs": COMBINES["ag_rs"](
            outputs[me], lses[me], group, collectives=DIST._replace(all_gather=gathered_without_one)
        ),
    }
    for name, wrong in faults.items():
        untouched = name == "swapped chunks" and me > 1
        assert torch.equal(wrong, right) == untouched, f"{name} on rank {me}"


def check_overlapped(group, members, me):
    """Micro-batches whose exchanges run in a thread beside the next attention: the bits of the exchange of the whole.

    A rank's attention takes its own time, so that ranks are at different micro-batches when an exchange begins.
    """
    outputs, lses = random_partials(21, members, 7, members * 2, 16, torch.float32, 0.2)
    whole = all_to_all_combine(outputs[me], lses[me], group)
    lanes, merged = ThreadLanes(), torch.full_like(whole, float("nan"))

    def attend(index, part):
        time.sleep(0.002 * ((me + index) % 3))
        return outputs[me, part], lses[me, part]

    def exchange(index, part, partial):
        merged[part] = all_to_all_combine(*partial, group)

    for count in (2, 3, 7):
        merged.fill_(float("nan"))
        overlapped(micro_batches(7, count), attend, exchange, lanes)
        assert torch.equal(merged, whole), count


def check_refusals(group, members):
    for combine in COMBINES.values():
        for output, lse, rule in (
            (torch.zeros(2, members + 1, 4), torch.zeros(2, members + 1), "not a multiple"),
            (torch.zeros(2, members, 4), torch.zeros(2, 1), r"not [B, H, D] and [B, H]"),
            (torch.zeros(2, members, 4), torch.zeros(2, members, dtype=torch.float16), "lse is torch.float16"),
        ):
            try:
                combine(output, lse, group)
            except ValueError as error:
                assert rule in str(error), error
            else:
                raise AssertionError(f"not refused: {rule}")


def check_one_member(group):
    """A group of one: the partial itself, but defined where it is empty."""
    outputs, lses = random_partials(9, 1, 3, 4, 5, torch.bfloat16, 0.4)
    for combine in COMBINES.values():
        output, lse = combine(outputs[0], lses[0], group, return_lse=True)
        gone = lses[0] == -INF
        assert torch.equal(output, outputs[0].masked_fill(gone[..., None], 0.0)) and torch.equal(lse, lses[0])


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    check_random_shapes(dist.group.WORLD, world, rank, cases=40)
    check_attention(dist.group.WORLD, world, rank, cases=10)
    check_faults_show(dist.group.WORLD, world, rank)
    check_overlapped(dist.group.WORLD, world, rank)
    check_refusals(dist.group.WORLD, world)
    # KVP groups are parts of a world: consecutive ranks, and (for the order of members) every second rank.
    halves = [list(range(world // 2)), list(range(world // 2, world))]
    for ranks in (*halves, list(range(0, world, 2)), list(range(1, world, 2))):
        group = dist.new_group(ranks)
        if rank in ranks and len(ranks) > 1:
            check_random_shapes(group, len(ranks), ranks.index(rank), cases=8)
        elif rank in ranks:
            check_one_member(group)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    world_size = int(sys.argv[1])
    mp.start_processes(rank_main, (world_size, sys.argv[2]), nprocs=world_size, start_method="fork")
