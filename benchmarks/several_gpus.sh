#!/usr/bin/env bash
# What takes several GPUs of one host, most wanted first: benchmarks/several_gpus.sh OUT [PART …]
#
# Call it again with the same OUT after a cut: finished parts are passed over, benchmarks and suites go on where they
# stopped (with the same code; else suites run again). Parts: tests exchange cells hop-b proof perf more; all of them
# unless some are named. LIMIT=N scales every part's time limit by N percent. DCP_PY: vLLM's vllm/v1/attention/ops/dcp.py,
# where vLLM itself is not installed; the suites need an installed vLLM, or `source benchmarks/offline_host.sh SITE`.
# NVLink multicast stays off: in NCCL, in torch's symmetric memory, and in everything of vLLM's that would ask for it.
set -u
out=$(realpath -m "$1"); mkdir -p "$out"; shift
wanted=" ${*:-tests exchange cells hop-b proof perf more} "
vllm=${DCP_PY:+--vllm-ops $DCP_PY}
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export VLLM_ALLREDUCE_USE_SYMM_MEM=0 VLLM_ALLREDUCE_USE_FLASHINFER=0 VLLM_FLASHINFER_ALLREDUCE_BACKEND=trtllm
export VLLM_USE_DIRECT_DCP_Q_GATHER=0 VLLM_USE_DIRECT_DCP_KV_GATHER=0
read -r gpus name < <(python3 -c "
import torch
count = torch.cuda.device_count()
print(count, torch.cuda.get_device_name().split()[1].lower() if count else 'none')")
[ "$gpus" -ge 2 ] || { echo "several_gpus.sh needs two GPUs; $gpus are here"; exit 1; }
sizes=$(for n in 8 4 2; do [ "$n" -le "$gpus" ] && echo "$n"; done)
most=${sizes%%$'\n'*}
echo "$gpus GPUs ($name); ranks: $(echo $sizes)"

. benchmarks/parts.sh

asked tests && part tests 240 python3 -m pytest -q -n 0 tests/combine/test_cuda_exchange.py tests/vllm_plugin/test_device_proof.py
if asked exchange; then
  for n in $sizes; do
    part "exchange-n$n" 240 python3 -m benchmarks.exchange --ranks "$n" $vllm --json "$out/exchange-$name-n$n.json"
  done
  python3 -m benchmarks.links --json "$out/links-$name.json" "$out"/exchange-"$name"-n*.json > "$out/links.log" 2>&1
fi
# Most wanted first, as the suite has them: CUDA graphs, eager, our own exchanges, standard DCP; the largest layouts.
# Servers of four ranks that share GPUs wait for each other's turns: eight at a time are enough (docs/recovery.md).
jobs=$((most > 2 ? 8 : 14))
asked cells && suite "cells-$most" 900 $jobs --suite several-gpus --cell "hopper/*/tp$most-*"
if asked hop-b; then
  for n in $sizes; do
    part "hop-b-n$n" 120 python3 -m benchmarks.hop_b --ranks "$n" --json "$out/hop_b-$name-n$n.json"
  done
fi
if asked proof; then  # what the proof of path costs a step of a real engine; PROOF_MODES: 44 GB of each GPU for every mode
  model=$(python3 -m harness.models deepseek-v2-lite-512k 2> /dev/null | tail -n 1)
  engines=()
  for mode in ${PROOF_MODES:-FULL_AND_PIECEWISE PIECEWISE}; do
    engines+=(--engine '{
      "attention_backend": "FLASHMLA", "block_size": 64, "max_model_len": 4096, "dtype": "bfloat16",
      "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2147483648, "dcp_comm_backend": "a2a",
      "max_num_seqs": 64, "max_cudagraph_capture_size": 64,
      "enforce_eager": '"$([ "$mode" = NONE ] && echo true || echo false)"',
      "compilation_config": {"cudagraph_mode": "'"$mode"'", "pass_config": {"fuse_allreduce_rms": false}}}')
  done
  part proof 480 python3 -m benchmarks.proof_cost --model "$model" --tp 2 --dcp 2 --helix --tokens 192 \
    "${engines[@]}" --json "$out/proof-cost-engine-$name.json"
fi
if asked perf; then
  suite "perf-$most" 900 1 --suite several-gpus-perf --cell "hopper/helix-*/tp$most-*/max-model-len=140000/*"
  suite "perf-512k-$most" 900 1 --suite several-gpus-perf --cell "hopper/helix-*/tp$most-*/max-model-len=530000/*"
  suite "perf-dcp-$most" 900 1 --suite several-gpus-perf --cell "hopper/standard-dcp/*/tp$most-*"
fi
if asked more; then  # everything else that this host can hold
  suite more 1800 $jobs --suite several-gpus
  [ "$gpus" -ge 4 ] && suite others 1800 $jobs --suite standard-tp --suite standard-dcp --suite helix-gqa --suite helix-mla \
    --cell 'hopper/*/llama-*' --cell 'hopper/*/deepseek-v2*/*'
fi
