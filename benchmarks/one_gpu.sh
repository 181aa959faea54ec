#!/usr/bin/env bash
# The cells of models made on the spot, ranks sharing one Hopper GPU, most wanted first: benchmarks/one_gpu.sh OUT [PART …]
#
# Call it again with the same OUT after a cut: finished parts are passed over, runs go on where they stopped (with the same
# code; else they begin anew). Parts: tests proof flashinfer flashmla flash-attn-mla triton-mla flash-attn limits published;
# all of them unless some are named. A part is a run of its own for one backend, so that its baselines are started once:
# `python -m harness merge OUT/run-* --allow suites --into EVIDENCE` makes one matrix of them. LIMIT=N scales every part's
# time limit by N percent; JOBS is how many cells lie side by side (8). Needs an installed vLLM, or
# `source benchmarks/offline_host.sh SITE`.
set -u
out=$(realpath -m "$1"); mkdir -p "$out"; shift
wanted=" ${*:-tests proof flashinfer flashmla flash-attn-mla triton-mla flash-attn limits published} "
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
. benchmarks/parts.sh

backend() {  # backend PART NAME SECONDS MODEL …: every mode, option and defect of one backend
  local part=$1 name=$2 limit=$3 model cells=(); shift 3
  for model; do cells+=(--cell "hopper/*/$name/$model/*"); done
  asked "$part" && suite "$part" "$limit" "${JOBS:-8}" --share-gpu --suite helix-gqa --suite helix-mla \
    --suite standard-dcp --suite kernels --suite faults "${cells[@]}"
}

asked tests && part tests 300 python3 -m pytest -q -n 8 tests/attention/test_device_attention.py tests/combine tests/overlap \
  tests/vllm_plugin/test_device_proof.py tests/vllm_plugin/test_token_count.py
asked proof && part proof 120 python3 -m benchmarks.proof_cost --json "$out/proof-cost.json"
backend flashinfer FLASHINFER 500 'llama-*'
backend flashmla FLASHMLA 500 deepseek-v2 deepseek-v2-retrieve
backend flash-attn-mla FLASH_ATTN_MLA 500 deepseek-v2 deepseek-v2-retrieve
backend triton-mla TRITON_MLA 500 deepseek-v2 deepseek-v2-retrieve
backend flash-attn FLASH_ATTN 500 'llama-*' 'qwen3-moe-*'
asked limits && suite limits 240 "${JOBS:-8}" --share-gpu --suite known-limitations \
  --cell 'hopper/*/llama-k4-h128/*' --cell 'hopper/*/qwen3-moe-*/*' --cell 'hopper/*/deepseek-v2*/*'
# The published layouts fill the GPU, and eight ranks take many minutes for a baseline: last, and alone.
asked published && suite published 900 1 --share-gpu --suite helix-gqa --suite helix-mla \
  --cell 'hopper/*/nemotron-nano-8b/*' --cell 'hopper/*/deepseek-v2-lite/*'
