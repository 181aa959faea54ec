"""Cells of CUDA backends on emulated ranks: `python emulated_ranks.py FOLDER CASES.json` prints one JSON line a case.

vLLM is imported once, on a stand-in for a GPU (`emulated_cuda.py`), and each case's ranks are forked from here. A rank
goes the way of a worker: the gate has admitted the configuration, `worker.activate` patches, vLLM's own groups are made
over gloo, its model is built inside the plugin's `load_model`, self-test included, its KV cache and metadata builders
as its engine and model runner make them. Then one attention layer answers a sequence of batches, which is compared with
full attention in fp64, and the proof of path is judged as the harness does.
"""

import json
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import emulated_cuda
import numpy as np
import torch
import torch.multiprocessing as mp


def sequence_of_batches(span: int):
    """Batches of (request, position of its first new token, new tokens), of requests 0 to 4.

    Requests with one new token come first, as the runner has them. Requests without context; a second chunk beside
    decodes; a prefix hit of `span` tokens, what one block holds on all ranks, alone; decodes of mixed lengths.
    """
    long, chunk = span + 9, span // 2 + 3
    return (
        ((1, 0, 1), (0, 0, 5), (2, 0, long)),
        ((1, 1, 1), (0, 5, 1), (2, long, 1), (3, 0, chunk)),
        ((0, 6, 1), (2, long + 1, 1), (3, chunk, 9)),
        ((4, span, 7),),
        ((1, 2, 1), (0, 7, 1), (2, long + 2, 1), (3, chunk + 9, 1), (4, span + 7, 1)),
        ((0, 8, 1),),
    )


#: Request 4 begins with what request 2 has cached, in the same blocks.
LATE, EARLY = 4, 2


@dataclass(frozen=True)
class Case:
    backend: str
    model: str
    tp: int
    kvp: int
    helix: bool
    comm: str
    interleave: int
    block: int = 16
    combine: str = "upstream"
    fault: str | None = None
    overlap: int = 1

    @property
    def mla(self) -> bool:
        return self.model.startswith("deepseek")

    @property
    def span(self) -> int:
        """Tokens of a sequence that one block holds on all ranks together."""
        return self.block * self.kvp

    @property
    def batches(self):
        return sequence_of_batches(self.span)

    def config(self, folder: Path):
        """vLLM's configuration of this case, through the gate."""
        from vllm.engine.arg_utils import EngineArgs

        from harness.models.recipe import find

        folder = folder / self.model
        folder.mkdir(exist_ok=True)
        small = {"num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 64, "num_attention_heads": 8}
        (folder / "config.json").write_text(json.dumps(find(self.model).config() | small))
        helix = {"helix_mode": self.helix, "share_gpu": True, "combine": self.combine, "allow_gqa_tpa1": True}
        helix |= {"overlap": self.overlap}
        helix |= {"proof_dir": str(folder / f"proof-{os.getpid()}-{abs(hash(self))}")}
        helix |= {"fault": self.fault} if self.fault else {}
        return EngineArgs(
            model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=1024,
            max_num_seqs=16, max_num_batched_tokens=1024, num_gpu_blocks_override=96, block_size=self.block,
            tensor_parallel_size=self.tp, decode_context_parallel_size=self.kvp, dcp_comm_backend=self.comm,
            cp_kv_cache_interleave_size=self.interleave, attention_backend=self.backend,
            distributed_executor_backend="mp", additional_config={"helix": helix},
        ).create_engine_config()  # fmt: skip


class Rank:
    """One worker of a case, as far as a GPU worker and its V2 model runner get without a GPU."""

    def __init__(self, case: Case, config, rank: int, rendezvous: str):
        from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu_worker import Worker
        from vllm.v1.worker.workspace import init_workspace_manager

        from helix_runtime.vllm_plugin import share_gpu, worker
        from helix_runtime.vllm_plugin.options import helix_options

        self.case, self.config, self.rank, self.device = case, config, rank, torch.device("cpu")
        options = helix_options(config.additional_config)
        Worker.load_model = _load_model
        Worker.compile_or_warm_up_model = lambda self: None
        share_gpu.install()
        worker.activate(config, options, rank)
        if case.combine == "triton":
            _kernels_without_a_gpu()
        init_distributed_environment(case.tp, rank, f"file://{rendezvous}", rank, "gloo")
        initialize_model_parallel(case.tp, decode_context_model_parallel_size=case.kvp)
        init_workspace_manager(self.device)
        self.worker = object.__new__(Worker)
        self.worker.vllm_config, self.worker.rank, self.worker.device = config, rank, self.device
        self.worker.model_runner = object.__new__(GPUModelRunner)
        self.worker.load_model()
        self.model = self.worker.model_runner.model
        (self.name,) = (name for name in config.compilation_config.static_forward_context if name.endswith("attn"))
        self.layer = config.compilation_config.static_forward_context[self.name]
        self._cache()
        self.worker.compile_or_warm_up_model()

    def _cache(self) -> None:
        """The KV cache, its metadata builders and block tables, as engine core and model runner make them."""
        from vllm.distributed.parallel_state import get_dcp_group
        from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
        from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache
        from vllm.v1.worker.gpu.block_table import BlockTables

        config, context = self.config, self.config.compilation_config.static_forward_context
        specs = get_kv_cache_spec(config)
        layouts = get_supported_kv_cache_layouts([layer.get_attn_backend() for layer in context.values()])
        resolve_kv_cache_layout(config, [[layout.name for layout in layouts]], specs.values())
        (self.kv,) = get_kv_cache_configs(config, [specs], [1 << 30])
        self.groups, _, sizes = init_attn_backend(self.kv, config, self.device)
        init_kv_cache(context, self.kv, self.device, sizes, config)
        for layer in context.values():
            layer.kv_cache.fill_(float("nan"))  # a slot that is read before it is written shows
        self.tables = BlockTables(
            block_sizes=sizes, max_num_reqs=16, max_num_batched_tokens=1024, max_num_blocks_per_group=[64],
            device=self.device, cp_size=self.case.kvp, cp_rank=get_dcp_group().rank_in_group,
            cp_interleave=self.case.interleave,
        )  # fmt: skip
        blocks = {request: [1 + 12 * request + i for i in range(12)] for request in range(5)}
        blocks[LATE][0] = blocks[EARLY][0]
        for request, ids in blocks.items():
            self.tables.append_block_ids(request, (ids,), overwrite=True)
        self.tables.apply_staged_writes()

    def answer(self, batch, inputs) -> torch.Tensor:
        """The layer's output [T, owned heads * D] for one batch, through the metadata of vLLM's V2 runner."""
        from vllm.config import set_current_vllm_config
        from vllm.distributed.parallel_state import get_dcp_group
        from vllm.forward_context import set_forward_context
        from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
        from vllm.v1.worker.gpu.cp_utils import prepare_dcp_local_seq_lens

        new = np.array([count for _, _, count in batch])
        starts = torch.tensor([0, *new.cumsum()], dtype=torch.int32)
        lengths = torch.tensor([start + count for _, start, count in batch], dtype=torch.int32)
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in batch])
        mapping = torch.tensor([request for request, _, _ in batch], dtype=torch.int32)
        tables = self.tables.gather_block_tables(mapping, len(batch))
        slots = self.tables.compute_slot_mappings(mapping, starts, positions, len(positions))
        local = prepare_dcp_local_seq_lens(
            torch.zeros(16, dtype=torch.int32), lengths, len(batch), self.case.kvp, get_dcp_group().rank_in_group,
            self.case.interleave, num_reqs_padded=len(batch),
        )  # fmt: skip
        with set_current_vllm_config(self.config):
            metadata = build_attn_metadata(
                attn_groups=self.groups, num_reqs=len(batch), num_tokens=len(positions), query_start_loc_gpu=starts,
                query_start_loc_cpu=starts, max_query_len=int(new.max()), seq_lens=lengths,
                max_seq_len=int(lengths.max()), block_tables=tables, slot_mappings=slots, kv_cache_config=self.kv,
                seq_lens_cpu_upper_bound=lengths, dcp_local_seq_lens=local, positions=positions,
            )  # fmt: skip
            by_layer = build_slot_mappings_by_layer(slots, self.kv)
            with set_forward_context(metadata, self.config, num_tokens=len(positions), slot_mapping=by_layer):
                return self.layer(*inputs)


def _load_model(self, *, load_dummy_weights: bool = False) -> None:
    """vLLM's model, built as its loader does."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(torch.bfloat16), set_current_vllm_config(self.vllm_config):
        self.model_runner.model = initialize_model(self.vllm_config)


def _dtypes_of_lse() -> set[str]:
    """The dtypes in which LSEs reach a combine from here on."""
    from helix_runtime.vllm_plugin import cuda_combine

    seen, struck = set(), cuda_combine._struck

    def noted(context, phase, lse):
        seen.add(str(lse.dtype))
        return struck(context, phase, lse)

    cuda_combine._struck = noted
    return seen


def _kernels_without_a_gpu() -> None:
    """Our kernels for `helix.combine`, interpreted, where the device would let them fall back to torch."""
    from helix_runtime.combine.packed import PackedCombine
    from helix_runtime.combine.select import Chosen
    from helix_runtime.combine.workspace import Workspace
    from helix_runtime.vllm_plugin import exchange

    exchange.choose = lambda wanted, group, device: Chosen("triton", PackedCombine(group, Workspace("cpu")))


class Gqa:
    """Random queries, keys and values of whole sequences, the same on every rank, and attention over them in fp64."""

    def __init__(self, rank: Rank):
        shape, draw = rank.config.model_config.hf_config, torch.Generator().manual_seed(0)
        self.heads, self.kv_heads, self.dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.query, self.key, self.value = (
            torch.randn(5, rank.case.span + 16, heads, self.dim, generator=draw).bfloat16()
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        for part in (self.key, self.value):
            part[LATE, : rank.case.span] = part[EARLY, : rank.case.span]
        case, me = rank.case, rank.rank
        computed = self.heads // (case.tp // case.kvp) if case.helix else self.heads // case.tp
        first = me // case.kvp * computed if case.helix else me * computed
        self.mine = slice(first, first + computed)
        group = self.heads // self.kv_heads
        self.mine_kv = slice(first // group, (first + computed - 1) // group + 1)
        owned = self.heads // case.tp
        self.owned = slice(me * owned, (me + 1) * owned)
        assert rank.layer.num_heads == computed and rank.layer.num_kv_heads == self.mine_kv.stop - self.mine_kv.start

    def inputs(self, rows):
        index = tuple(rows.T)
        return [
            part[index][:, heads].flatten(1)
            for part, heads in ((self.query, self.mine), (self.key, self.mine_kv), (self.value, self.mine_kv))
        ]

    def expected(self, rows) -> torch.Tensor:
        group, found = self.heads // self.kv_heads, []
        for request, position in rows.tolist():
            key, value = (part[request, : position + 1] for part in (self.key, self.value))
            key, value = (part.repeat_interleave(group, 1)[:, self.owned] for part in (key, value))
            query = self.query[request, position : position + 1, self.owned]
            found.append(emulated_cuda._attend(query, key, value, self.dim**-0.5)[0])
        return torch.cat(found).flatten(1)


class Mla:
    """The same for latents: random queries, latents and an up-projection that every rank holds its heads of."""

    def __init__(self, rank: Rank):
        shape, draw = rank.config.model_config.hf_config, torch.Generator().manual_seed(0)
        self.heads, self.latent, self.rope = shape.num_attention_heads, shape.kv_lora_rank, shape.qk_rope_head_dim
        self.nope, self.dim, tokens = shape.qk_nope_head_dim, shape.v_head_dim, rank.case.span + 16
        self.query = torch.randn(5, tokens, self.heads, self.nope + self.rope, generator=draw).bfloat16()
        self.cached = torch.randn(5, tokens, self.latent + self.rope, generator=draw).bfloat16()
        up = torch.randn(self.heads, self.nope + self.dim, self.latent, generator=draw) * self.latent**-0.5
        self.up = up.bfloat16()
        self.cached[LATE, : rank.case.span] = self.cached[EARLY, : rank.case.span]
        owned = self.heads // rank.case.tp
        self.owned = slice(rank.rank * owned, (rank.rank + 1) * owned)
        layer = rank.layer
        layer.kv_b_proj.weight.data.copy_(self.up[self.owned].flatten(0, 1))
        layer.process_weights_after_loading(torch.bfloat16)
        self.scale = layer.scale
        assert layer.num_heads == owned

    def inputs(self, rows):
        index = tuple(rows.T)
        query, cached = self.query[index][:, self.owned], self.cached[index]
        size = torch.Size([len(rows), (self.owned.stop - self.owned.start) * self.dim])
        return query, cached[:, : self.latent].contiguous(), cached[:, None, self.latent :].contiguous(), size

    def expected(self, rows) -> torch.Tensor:
        found, up = [], self.up[self.owned].double()
        for request, position in rows.tolist():
            cached = self.cached[request, : position + 1].double()
            keys = torch.einsum("hdl,kl->khd", up[:, : self.nope], cached[:, : self.latent])
            values = torch.einsum("hdl,kl->khd", up[:, self.nope :], cached[:, : self.latent])
            shared = cached[:, None, self.latent :].expand(-1, keys.shape[1], -1)
            query = self.query[request, position : position + 1, self.owned]
            found.append(emulated_cuda._attend(query, torch.cat([keys, shared], -1), values, self.scale)[0])
        return torch.cat(found).flatten(1)


def run(case: Case, config, rank: int, rendezvous: str, results) -> None:
    """One forked rank: (rank, largest relative error of each batch, or what ended it) into `results`."""
    try:
        torch.set_num_threads(1)
        np.seterr(all="ignore")
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(config):
            made = Rank(case, config, rank, rendezvous)
        data = (Mla if case.mla else Gqa)(made)
        errors, dtypes = [], _dtypes_of_lse()
        for batch in case.batches:
            rows = torch.tensor([(request, start + i) for request, start, count in batch for i in range(count)])
            found, wanted = made.answer(batch, data.inputs(rows)).double(), data.expected(rows)
            assert found.shape == wanted.shape, (found.shape, wanted.shape)
            error = (found - wanted).abs().max() / wanted.abs().max()
            errors.append(float(error.nan_to_num(float("inf"))))
        from helix_runtime.vllm_plugin.context_parallel import current

        proof = current().proof
        proof.publish(proof.on_device.read())
        results.put((rank, (errors, sorted(dtypes))))
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        destroy_model_parallel()
        destroy_distributed_environment()
    except BaseException:
        results.put((rank, traceback.format_exc()))


def judge(case: Case, config, results: dict) -> dict:
    """The largest error of each batch over all ranks, what failed, and what the harness says of the proofs."""
    from harness.cell import Cell
    from harness.oracle.proof import check_proof
    from helix_runtime.proof import read_proofs

    failed = [said for said in results.values() if isinstance(said, str)]
    if failed:
        return {"errors": [], "failed": failed[0], "proof": None}
    proofs = read_proofs(config.additional_config["helix"]["proof_dir"])
    mode = ("helix-mla" if case.mla else "helix-gqa") if case.helix else "standard-dcp"
    cell = Cell(
        mode=mode, backend=case.backend, hardware="hopper", model=f"recipe:{case.model}", tp=case.tp, kvp=case.kvp,
        interleave=case.interleave, comm=case.comm, helix=(("overlap", case.overlap),),
    )  # fmt: skip
    longest = max(start + count for batch in case.batches for _, start, count in batch)
    return {
        "errors": [max(column) for column in zip(*(errors for errors, _ in results.values()), strict=True)],
        "lse_dtypes": sorted({dtype for _, dtypes in results.values() for dtype in dtypes}),
        "failed": None,
        "proof": check_proof(cell, proofs, longest),
        "counters": proofs[0].counters,
        "combine": proofs[0].combine_impl,
        "lse_base": proofs[0].lse_base,
    }


def main(folder: Path, cases: list[Case]) -> None:
    import vllm.v1.worker.gpu.model_runner
    import vllm.v1.worker.gpu_worker  # noqa: F401  (once, before ranks are forked)

    from helix_runtime import vllm_plugin

    vllm_plugin.register()
    context = mp.get_context("fork")
    for case in cases:
        config, results = case.config(folder), context.Queue()
        rendezvous = tempfile.mktemp(dir=folder)
        ranks = [
            context.Process(target=run, args=(case, config, rank, rendezvous, results), daemon=True)
            for rank in range(case.tp)
        ]
        for process in ranks:
            process.start()
        found = {}
        while len(found) < case.tp and not any(isinstance(value, str) for value in found.values()):
            rank, said = results.get(timeout=600)
            found[rank] = said
        for process in ranks:
            if len(found) < case.tp:
                process.terminate()  # it waits for the one that failed
            process.join()
        print(json.dumps(judge(case, config, found)), flush=True)


if __name__ == "__main__":
    emulated_cuda.install()
    main(Path(sys.argv[1]), [Case(**case) for case in json.loads(Path(sys.argv[2]).read_text())])
