# Sourced by scripts of long lists of commands that are cut off and called again: needs `out` (folder), `wanted` (" A B ").
# LIMIT=N scales every part's time limit by N percent.

part() {  # part NAME SECONDS COMMAND …: unless it has ended well before
  local part=$1 limit=$(($2 * ${LIMIT:-100} / 100)); shift 2
  [ -e "$out/$part.done" ] && return 0
  echo "== $part, $limit s"
  timeout -s INT -k 30 "$limit" "$@" >> "$out/$part.log" 2>&1
  local status=$?
  [ $status -eq 0 ] && touch "$out/$part.done" || echo "$part ended with status $status"
  tail -n 4 "$out/$part.log" | cut -c1-200
  return $status
}

suite() {  # suite NAME SECONDS JOBS ARGUMENTS …: a run of the harness, resumed if it is there
  local run=$out/run-$1 name=$1 limit=$2 jobs=$3; shift 3
  if [ -e "$run/ledger.ndjson" ]; then set -- --resume "$run"; else set -- --hardware hopper --run-dir "$run" "$@"; fi
  part "$name" "$limit" python3 -m harness run --jobs "$jobs" "$@"
  [ $? -eq 1 ] && touch "$out/$name.done"  # verdicts that differ are an end as well; what was cut goes on next time
}

asked() { [[ $wanted == *" $1 "* ]]; }
