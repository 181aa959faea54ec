# source benchmarks/offline_host.sh SITE: this package beside a vLLM in the folder SITE, on a host that reaches no registry.
#
# SITE is a folder of unpacked wheels (vLLM, its dependencies, duckdb) that was brought along; nothing is installed. Makes
# there what an install would make: the commands `vllm` and `helix`, and the entry point by which vLLM finds the plugin;
# and compiles bytecode once, since a dozen processes would each do it at their first import. Then:
#
#   python3 -m harness run --hardware hopper --share-gpu --jobs 4 --run-dir RUN --suite helix-gqa --cell 'hopper/*/llama-*'
#   python3 -m harness run --resume RUN --jobs 4             after a cut; with the same code, or everything runs again
#   benchmarks/one_gpu.sh OUT                                every cell for one GPU in parts, most wanted first
#
# What was seen on one H100 with 16 cores: 21 s to start a server of one rank, 50 s for one of four, of which imports are
# most (four cells at a time, or eight: about as many a minute); FLASHINFER compiles for two minutes at its first start,
# which a kept ~/.cache/flashinfer saves.
_site=$(realpath "$1")
_here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_dist=$_site/helix_parallel-0.1.0.dist-info
mkdir -p "$_site/bin" "$_dist"
printf 'Metadata-Version: 2.1\nName: helix-parallel\nVersion: 0.1.0\n' > "$_dist/METADATA"
printf '[vllm.general_plugins]\nhelix = helix_runtime.vllm_plugin:register\n' > "$_dist/entry_points.txt"
printf '#!/bin/sh\nexec python3 -m vllm.entrypoints.cli.main "$@"\n' > "$_site/bin/vllm"
printf '#!/bin/sh\nexec python3 -m helix_runtime.serve "$@"\n' > "$_site/bin/helix"
chmod +x "$_site/bin/vllm" "$_site/bin/helix"
if [ ! -e "$_site/.compiled" ]; then
  python3 -m compileall -q -j "$(nproc)" "$_site/vllm" "$_site/torch" "$_site/transformers" > /dev/null 2>&1
  touch "$_site/.compiled"
fi
export PYTHONPATH="$_here:$_site" PATH="$_site/bin:$PATH" VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
