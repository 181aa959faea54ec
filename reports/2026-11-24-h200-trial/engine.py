"""One vLLM engine: answers fixed prompts greedily and writes tokens, logprobs and proofs as JSON."""

import json
import os
import random
import sys
import time

t0 = time.time()
os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_USE_FLASHINFER_SAMPLER="0")
if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    a = json.loads(sys.argv[1])
    name = a["name"]
    helix = a.get("helix")
    tp = a.get("tp", 1)
    ac = {"helix": {**helix, "proof_dir": f"/tmp/proof-{name}"}} if helix is not None else {}
    kw = dict(a.get("kw", {}))
    llm = LLM(
        a["model"],
        tensor_parallel_size=tp,
        dtype=a.get("dtype", "bfloat16"),
        enforce_eager=True,
        max_model_len=a.get("max_len", 32768),
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 29,
        gpu_memory_utilization=0.05,
        max_num_seqs=16,
        additional_config=ac,
        distributed_executor_backend="mp" if tp > 1 else None,
        **kw,
    )
    t1 = time.time()
    r = random.Random(0)
    lens = a.get("lens", [1, 2, 3, 5, 17, 33, 64, 65, 129, 700, 3000])
    ps = [[r.randrange(3, 512) for _ in range(n)] for n in lens]
    sp = SamplingParams(temperature=0, max_tokens=24, logprobs=8, detokenize=False, ignore_eos=True)
    runs = []
    for batch in (ps, [ps[-1]], ps[:4] + [ps[-1]]):
        outs = llm.generate([{"prompt_token_ids": p} for p in batch], sp)
        runs.append(
            [
                [
                    {"t": t, "lp": {k: v.logprob for k, v in d.items()}}
                    for t, d in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)
                ]
                for o in outs
            ]
        )
    proofs = []
    if helix is not None:
        import dataclasses

        from helix_runtime.proof import read_proofs

        proofs = [dataclasses.asdict(p) for p in read_proofs(f"/tmp/proof-{name}")]
    json.dump(
        {"runs": runs, "proofs": proofs, "start_s": t1 - t0, "gen_s": time.time() - t1},
        open(os.environ.get("OUT", ".") + f"/{name}.json", "w"),
    )
    print("DONE", name, round(t1 - t0, 1), round(time.time() - t1, 1), flush=True)
