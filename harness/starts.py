"""Clean starts: right servers over modes, models and seeds, each asked several disjoint prompt sets.

    python -m harness starts FOLDER [--only GLOB] [--limit N] [--sets N] [--jobs N] [--list]

What the oracle says of these is its false-alarm rate (`python -m harness alarms FOLDER`). Every group has a baseline,
stock and decoding freely; every other start of the group is forced along its tokens, set by set. The first FIRST starts
of the plan cover every mode, family, dtype and combine, nearly all of them on weights that no shipped band was measured
with; with FIRST_SETS sets each they give over 299 comparisons of the kind that a run makes, so that no alarm among them
bounds the rate at 1 %. Resumable: a start whose folder is complete is left alone. A folder holds `start.json` (which
cell, which sets, what its workers proved), one `set-N.json` a prompt set (a `Transcript`), the baseline's also
`workload-N.json`, and `server.log`.
"""

import argparse
import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from harness.cell import Cell, Mode
from harness.client import answer_all
from harness.executors.local import dtype_of, shape_of
from harness.frozen import Frozen
from harness.lease import lease_port
from harness.server.launch import forced_decode, make_launch
from harness.server.process import Server, ServerFailed
from harness.transcript import Transcript
from harness.workload import Workload, make_workload
from helix_runtime.proof import read_proofs

SETS = 5
FIRST, FIRST_SETS = 41, 12
SERVE = (
    ("max-model-len", 2048), ("enforce-eager", True), ("kv-cache-memory-bytes", 2**26), ("seed", 0),
)  # fmt: skip


class Start(Frozen):
    """One server to start: `group` names the tokens it follows, `name` its folder; `leads` is the group's baseline."""

    group: str
    name: str
    cell: Cell
    leads: bool = False


class Record(Frozen):
    """`start.json`: what a folder holds. `workload_seeds[i]` made the prompts of `set-i.json`."""

    start: Start
    dtype: str
    workload_seeds: tuple[int, ...]
    start_seconds: float
    set_seconds: tuple[float, ...]
    proof: tuple[dict, ...]


class Group(Frozen):
    """A model, its block size, and the TP whose boundaries the prompts probe; members are compared with each other."""

    model: str
    block: int = 32
    tp: int = 4
    dtype: str = "float32"

    @property
    def name(self) -> str:
        bare = self.model.removeprefix("recipe:")
        return bare if self.dtype == "float32" else f"{bare}-{self.dtype}"

    @property
    def mla(self) -> bool:
        return "deepseek" in self.model

    def cell(self, mode: Mode, tp: int, kvp: int = 1, interleave: int = 1, comm: str | None = None, seats: int = 16):
        stock, ours = ("CPU_MLA", "HELIX_CPU_MLA") if self.mla else ("CPU_ATTN", "HELIX_CPU")
        tpa1 = mode is Mode.HELIX_GQA and tp == kvp
        return Cell(
            mode=mode,
            backend=stock if mode is Mode.STANDARD_TP else ours,
            hardware="cpu",
            model=self.model,
            tp=tp,
            kvp=kvp,
            interleave=interleave,
            comm=comm,
            serve=(("dtype", self.dtype), *SERVE, ("block-size", self.block), ("max-num-seqs", seats)),
            helix=(("allow_gqa_tpa1", True),) if tpa1 else (),
            workload="smoke",
        )

    def workloads(self, count: int) -> list[tuple[int, Workload]]:
        """(seed, workload) of `count` prompt sets, no two of which share a prompt."""
        shape = shape_of(self.model)
        made: list[tuple[int, Workload]] = []
        seen: set[tuple[int, ...]] = set()
        seed = 1000
        while len(made) < count:
            workload = make_workload(
                tp=self.tp,
                block=self.block,
                vocab=shape.vocab_size,
                max_model_len=dict(SERVE)["max-model-len"],
                profile="smoke",
                seed=seed,
                retrieves=self.model if "-retrieve" in self.model else None,
                seats=16,
            )
            prompts = {prompt.token_ids for prompt in workload.prompts}
            if not prompts & seen:
                made.append((seed, workload))
                seen |= prompts
            seed += 1
        return made


def groups() -> Iterator[tuple[Group, list[Cell]]]:
    """Every group with the cells that follow its baseline (standard TP at the group's TP)."""
    yield from _held_out()
    yield from _others()


def _held_out() -> Iterator[tuple[Group, list[Cell]]]:
    """The first FIRST starts. Two ranks wherever they show the same as four, which answer far more slowly where two
    cores share them. TP4 beside one TP2, so that standard TP is itself among what is judged."""
    tp, dcp, gqa, mla = Mode.STANDARD_TP, Mode.STANDARD_DCP, Mode.HELIX_GQA, Mode.HELIX_MLA
    k4 = Group(model="recipe:llama-k4-seed3", tp=2)
    yield k4, [
        k4.cell(tp, 1), k4.cell(tp, 4), k4.cell(gqa, 2, 2, 16, "a2a"), k4.cell(gqa, 2, 2, 1, "a2a"),
        k4.cell(gqa, 2, 2, 1, "ag_rs"), k4.cell(gqa, 2, 2, 32, "a2a"), k4.cell(gqa, 2, 2, 16, "ag_rs"),
    ]  # fmt: skip
    v2 = Group(model="recipe:deepseek-v2-seed3", block=16, tp=2)
    yield v2, [
        v2.cell(tp, 1), v2.cell(mla, 2, 2, 16, "a2a"), v2.cell(mla, 2, 2, 1, "a2a"), v2.cell(mla, 2, 2, 1, "ag_rs"),
        v2.cell(mla, 2, 2, 16, "ag_rs"), v2.cell(dcp, 2, 2, 16, "ag_rs"), v2.cell(dcp, 2, 2, 1, "a2a"),
    ]  # fmt: skip
    # vLLM's rule for standard DCP with GQA is TP > K, so with two ranks the model has one KV head.
    k1 = Group(model="recipe:llama-k1-seed3", tp=2)
    yield k1, [
        k1.cell(tp, 1), k1.cell(dcp, 2, 2, 1, "ag_rs"), k1.cell(dcp, 2, 2, 16, "a2a"), k1.cell(dcp, 2, 2, 16, "ag_rs"),
    ]  # fmt: skip
    bf16 = Group(model="recipe:llama-k4-seed3", tp=2, dtype="bfloat16")
    yield bf16, [
        bf16.cell(tp, 1), bf16.cell(gqa, 2, 2, 16, "a2a"), bf16.cell(gqa, 2, 2, 1, "ag_rs"),
        bf16.cell(gqa, 2, 2, 1, "a2a"),
    ]  # fmt: skip
    fp16 = Group(model="recipe:llama-k4-seed3", tp=2, dtype="float16")
    yield fp16, [fp16.cell(tp, 1), fp16.cell(gqa, 2, 2, 16, "a2a"), fp16.cell(gqa, 2, 2, 1, "ag_rs")]
    qwen = Group(model="recipe:qwen3-k4-seed3", tp=2)
    yield qwen, [qwen.cell(tp, 1), qwen.cell(gqa, 2, 2, 16, "a2a"), qwen.cell(gqa, 2, 2, 1, "ag_rs")]
    finds = Group(model="recipe:llama-retrieve-k4", tp=2)
    yield finds, [finds.cell(tp, 1), finds.cell(gqa, 2, 2, 16, "a2a")]
    four = Group(model="recipe:llama-k4-seed4")
    yield four, [four.cell(tp, 1), four.cell(gqa, 4, 2, 16, "a2a"), four.cell(gqa, 4, 4, 1, "ag_rs")]


def _others() -> Iterator[tuple[Group, list[Cell]]]:
    """More of the same, and the weights that shipped bands are measured with (`python -m harness.oracle.ship`)."""
    tp, dcp, gqa, mla = Mode.STANDARD_TP, Mode.STANDARD_DCP, Mode.HELIX_GQA, Mode.HELIX_MLA
    k4 = Group(model="recipe:llama-k4")
    yield k4, [
        k4.cell(gqa, 4, 2, 16, "a2a"), k4.cell(tp, 1), k4.cell(tp, 2), k4.cell(tp, 4), k4.cell(gqa, 4, 2, 1, "a2a"),
        k4.cell(gqa, 4, 2, 1, "ag_rs"), k4.cell(gqa, 4, 2, 32, "a2a"), k4.cell(gqa, 4, 2, 16, "ag_rs"),
        k4.cell(gqa, 4, 4, 16, "a2a"), k4.cell(tp, 4, seats=4), k4.cell(tp, 8), k4.cell(gqa, 4, 2, 32, "ag_rs"),
        k4.cell(gqa, 4, 4, 1, "a2a"), k4.cell(gqa, 4, 4, 16, "ag_rs"), k4.cell(gqa, 4, 4, 1, "ag_rs"),
    ]  # fmt: skip
    v2 = Group(model="recipe:deepseek-v2", block=16)
    yield v2, [v2.cell(mla, 4, 4, 16, "a2a"), v2.cell(tp, 1), v2.cell(tp, 2)]
    k4b = Group(model="recipe:llama-k4-seed1", tp=2)
    yield k4b, [
        k4b.cell(gqa, 2, 2, 16, "a2a"), k4b.cell(tp, 1), k4b.cell(gqa, 2, 2, 1, "ag_rs"),
        k4b.cell(gqa, 2, 2, 1, "a2a"), k4b.cell(gqa, 2, 2, 16, "ag_rs"),
    ]  # fmt: skip
    v2b = Group(model="recipe:deepseek-v2-seed1", block=16, tp=2)
    yield v2b, [
        v2b.cell(mla, 2, 2, 16, "a2a"), v2b.cell(tp, 1), v2b.cell(mla, 2, 2, 1, "ag_rs"),
        v2b.cell(dcp, 2, 2, 16, "ag_rs"), v2b.cell(dcp, 2, 2, 1, "a2a"),
    ]  # fmt: skip
    k1 = Group(model="recipe:llama-k1-seed1", tp=2)
    yield k1, [
        k1.cell(dcp, 2, 2, 1, "ag_rs"), k1.cell(dcp, 2, 2, 16, "a2a"), k1.cell(tp, 1), k1.cell(dcp, 2, 2, 16, "ag_rs"),
        k1.cell(dcp, 2, 2, 1, "a2a"),
    ]  # fmt: skip
    qwen = Group(model="recipe:qwen3-k4", tp=2)
    yield qwen, [qwen.cell(gqa, 2, 2, 16, "a2a"), qwen.cell(tp, 1), qwen.cell(gqa, 2, 2, 1, "ag_rs")]
    v2c = Group(model="recipe:deepseek-v2-seed2", block=16, tp=2)
    yield v2c, [v2c.cell(mla, 2, 2, 16, "ag_rs"), v2c.cell(mla, 2, 2, 1, "a2a"), v2c.cell(tp, 1)]
    k4c = Group(model="recipe:llama-k4-seed2", tp=2)
    yield k4c, [k4c.cell(gqa, 2, 2, 32, "a2a"), k4c.cell(gqa, 2, 2, 16, "a2a"), k4c.cell(tp, 1)]
    k2 = Group(model="recipe:llama-k2")
    yield k2, [k2.cell(dcp, 4, 2, 1, "ag_rs"), k2.cell(dcp, 4, 2, 16, "a2a"), k2.cell(tp, 1)]
    # The dtypes of GPUs, each with several sizes of standard TP, which are the null.
    bf16 = Group(model="recipe:llama-k4", dtype="bfloat16")
    yield bf16, [
        bf16.cell(tp, 1), bf16.cell(gqa, 4, 2, 16, "a2a"), bf16.cell(tp, 4, seats=4), bf16.cell(tp, 2),
        bf16.cell(gqa, 4, 2, 1, "ag_rs"),
    ]  # fmt: skip
    fp16 = Group(model="recipe:llama-k4", tp=2, dtype="float16")
    yield fp16, [
        fp16.cell(tp, 1), fp16.cell(tp, 4), fp16.cell(tp, 8), fp16.cell(gqa, 2, 2, 16, "a2a"),
        fp16.cell(gqa, 2, 2, 1, "ag_rs"),
    ]  # fmt: skip
    v2c = Group(model="recipe:deepseek-v2", block=16, tp=2, dtype="bfloat16")
    yield v2c, [v2c.cell(tp, 1), v2c.cell(mla, 2, 2, 16, "a2a"), v2c.cell(tp, 4)]
    keen = Group(model="recipe:llama-retrieve-k4", tp=2, dtype="bfloat16")
    yield keen, [keen.cell(tp, 1), keen.cell(gqa, 2, 2, 16, "a2a"), keen.cell(tp, 4)]


def starts() -> list[tuple[Group, Start]]:
    """The plan: each group's baseline, then what follows it."""
    plan: list[tuple[Group, Start]] = []
    for group, cells in groups():
        lead = group.cell(Mode.STANDARD_TP, group.tp)
        plan.append((group, Start(group=group.name, name=f"{group.name}--baseline", cell=lead, leads=True)))
        plan += [(group, Start(group=group.name, name=_name(group, cell), cell=cell)) for cell in cells]
    return plan


def as_run(plan: Sequence[tuple[Group, Start]]) -> int:
    """Comparisons a prompt set of the kind that a run makes: of a start with its group's baseline, where a third of
    standard TP, of another size, gives the null."""
    sizes: dict[str, list[Start]] = defaultdict(list)
    for _, start in plan:
        if start.cell.baseline and not start.leads:
            sizes[start.group].append(start)
    return sum(
        any(other is not start and other.cell.tp != group.tp for other in sizes[group.name])
        for group, start in plan
        if not start.leads
    )


def _name(group: Group, cell: Cell) -> str:
    seats = dict(cell.serve)["max-num-seqs"]
    parts = [group.name, str(cell.mode), f"tp{cell.tp}", *([f"dcp{cell.kvp}", f"i{cell.interleave}"] * (cell.kvp > 1))]
    return "-".join([*parts, *([cell.comm] if cell.comm else []), *([f"seats{seats}"] if seats != 16 else [])])


def make(group: Group, start: Start, root: Path, sets: int) -> Record:
    """Start the server, ask every set, write the folder. ServerFailed when it does not come up or dies."""
    folder = root / start.name
    folder.mkdir(parents=True, exist_ok=True)
    leader, dtype = root / f"{group.name}--baseline", dtype_of(start.cell)
    if start.leads:
        asked = group.workloads(sets)
        for index, (_, workload) in enumerate(asked):
            (folder / f"workload-{index}.json").write_text(workload.model_dump_json())
        seeds, follow = tuple(seed for seed, _ in asked), [None] * sets
    else:
        seeds = read_record(leader).workload_seeds
        follow = [Transcript.load(leader / f"set-{index}.json") for index in range(sets)]
    # Read back, so that all of a group are asked the same even if the code that makes prompts changes on the way.
    workloads = [Workload.model_validate_json((leader / f"workload-{index}.json").read_text()) for index in range(sets)]
    seconds: list[float] = []
    with lease_port() as port:
        launch = make_launch(start.cell, folder.absolute(), port)
        if start.cell.baseline and not start.leads:  # stock, but for the processor that imposes tokens
            launch = launch.model_copy(
                update={"argv": (*launch.argv, "--logits-processors", forced_decode(start.cell))}
            )
        began = time.monotonic()
        with Server(launch, folder / "server.log") as server:
            started = time.monotonic() - began
            for index, workload in enumerate(workloads):
                began = time.monotonic()
                answers = answer_all(server, start.cell, workload, dtype, follow=follow[index])
                answers.save(folder / f"set-{index}.json")
                seconds.append(round(time.monotonic() - began, 2))
            proofs = read_proofs(launch.proof_dir) if launch.proof_dir else []
    record = Record(
        start=start,
        dtype=dtype,
        workload_seeds=seeds,
        start_seconds=round(started, 2),
        set_seconds=tuple(seconds),
        proof=tuple(dataclasses.asdict(proof) for proof in proofs),
    )
    (folder / "start.json").write_text(record.model_dump_json(indent=1))
    return record


def read_record(folder: Path) -> Record:
    return Record.model_validate_json((folder / "start.json").read_text())


def complete(root: Path, start: Start, sets: int) -> bool:
    """Whether `start` is there, made for the same cell, with at least `sets` sets."""
    folder = root / start.name
    if not (folder / "start.json").is_file():
        return False
    known = read_record(folder)
    return known.start.cell == start.cell and len(known.workload_seeds) >= sets


def main(arguments: Sequence[str]) -> int:
    """`python -m harness starts`. Exit status 3 when a server failed."""
    parser = argparse.ArgumentParser(prog="python -m harness starts", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", metavar="GLOB", help="starts whose name matches")
    parser.add_argument("--limit", type=int, default=10_000, metavar="N", help="only the first N of these")
    parser.add_argument("--sets", type=int, default=SETS, metavar="N", help=f"prompt sets a start (default {SETS})")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="make so many groups at a time (default 1)")
    parser.add_argument("--list", action="store_true", help="print the plan and what of it is there")
    options = parser.parse_args(arguments)
    plan = [(group, start) for group, start in starts() if fnmatchcase(start.name, options.only)]
    there = {start.name for _, start in plan if complete(options.folder, start, options.sets)}
    if options.list:
        for _, start in plan:
            print(f"{'there  ' if start.name in there else 'missing'}  {start.name}")
        listed = plan[: options.limit]
        print(f"{len(listed)} starts, {as_run(listed) * options.sets} comparisons of the kind that a run makes")
        return 0
    wanted: dict[str, list[tuple[Group, Start]]] = defaultdict(list)  # a group's starts one after the other
    for group, start in [item for item in plan[: options.limit] if item[1].name not in there]:
        wanted[group.name].append((group, start))
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = sum(pool.map(lambda some: _make_all(some, options.folder, options.sets), wanted.values()))
    return 3 if failed else 0


def _make_all(some: Sequence[tuple[Group, Start]], folder: Path, sets: int) -> int:
    """Make these starts, in this order; returns how many failed."""
    failed = 0
    for group, start in some:
        try:
            record = make(group, start, folder, sets)
        except (ServerFailed, OSError) as problem:
            failed += 1
            print(f"failed   {start.name}: {problem}", flush=True)
            continue
        print(f"made     {start.name}: {record.start_seconds} s, sets {list(record.set_seconds)} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
