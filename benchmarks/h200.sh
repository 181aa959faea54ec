#!/usr/bin/env bash
# All benchmarks and GPU tests of this package on one Hopper GPU, most wanted first: benchmarks/h200.sh OUT [DCP_PY]
#
# OUT gets the JSON and logs; a part that fails or runs out of time leaves the rest to run. DCP_PY: vLLM's
# vllm/v1/attention/ops/dcp.py, where vLLM itself is not installed. FlashAttention 3 and FlashMLA are found in the
# installed vllm, or in a folder `vllm` on PYTHONPATH that holds only vllm_flash_attn/_vllm_fa3_C.abi3.so and
# _flashmla_C.abi3.so: torch alone loads them.
set -u
out=$(realpath -m "$1"); mkdir -p "$out"
vllm=${2:+--vllm-ops $2}
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1

part() {  # part NAME SECONDS COMMAND …
  local name=$1 limit=$2; shift 2
  echo "== $name"
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  local status=$?
  [ $status -eq 0 ] || echo "$name ended with status $status"
  tail -n 4 "$out/$name.log" | cut -c1-200
}

part test-attention 150 python3 -m pytest -q -n 8 tests/attention/test_device_attention.py
part test-combine 150 python3 -m pytest -q -n 3 tests/combine tests/overlap
part overlap 90 python3 -m benchmarks.overlap --json "$out/overlap-h200.json"
part attention 150 python3 -m benchmarks.attention --json "$out/attention-h200.json"
part combine 240 python3 -m benchmarks.combine $vllm --json "$out/combine-h200.json"
part step 120 python3 -m benchmarks.step --json "$out/step-h200.json"
