#!/usr/bin/env bash
# Measures one GPU in under nine minutes: correctness against CPU float32, then speed. Prints a JSON line per figure, in
# which the time that jrlhf estimates for the very program stands beside the measured one; and their ratios at the end.
#
#   bash benchmarks/gpu.sh benchmarks/results/gpu.jsonl
#
# PYTHON names the interpreter. DEVICE=cpu TINY=1 tests this file with sizes that take a CPU minutes.
set -uo pipefail

out=${1:?the file to write}
python=${PYTHON:-python}
device=${DEVICE:-gpu}
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/..:$here${PYTHONPATH:+:$PYTHONPATH}"
# Peak memory is then the use of the program, not the reservation of JAX.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
failed=0
: > "$out"

run() { # seconds, file, flags: names a benchmark that fails or takes too long, and continues
  local limit=$1 file=$2
  shift 2
  if [ -n "${TINY:-}" ]; then
    set -- "$@" --hidden 16 --layers 1 --heads 2 --kv-heads 1 --ffn 32 --vocab 64 --repeats 1 "${tiny[@]}"
  fi
  if ! timeout "$limit" "$python" "$here/$file.py" --device "$device" "$@" >> "$out"; then
    echo "gpu.sh: failed: $file $*" >&2
    failed=1
  fi
}

kernels=(xla cudnn)
[ "$device" = gpu ] || kernels=(xla)

tiny=(--batch 2 --length 16 --new 4)
run 90 device_check --shape S

tiny=(--batch 2 --length 16)
for attention in "${kernels[@]}"; do
  run 60 sft_step --shape M --dtype bfloat16 --batch 16 --length 1024 --attention "$attention"
  run 60 sft_step --shape 1B --dtype bfloat16 --batch 8 --length 1024 --remat --attention "$attention"
done
run 75 sft_step --shape 3B --dtype bfloat16 --batch 4 --length 1024 --remat --attention "${kernels[-1]}"
run 60 reward_step --shape M --dtype bfloat16 --batch 8 --length 1024 --attention "${kernels[-1]}"
run 60 reward_step --shape 1B --dtype bfloat16 --batch 4 --length 1024 --remat --attention "${kernels[-1]}"
tiny=(--batch 2 --prompt 8 --new 4)
for batch in 1 32 256; do
  run 45 generate --shape M --dtype bfloat16 --batch "$batch" --prompt 128 --new 128
done
for batch in 1 32; do
  run 45 generate --shape 1B --dtype bfloat16 --batch "$batch" --prompt 128 --new 128
done
tiny=(--episodes 8 --prompt 8 --new 4)
run 75 ppo_iteration --shape M --dtype bfloat16 --episodes 64 --prompt 128 --new 128 --accumulation 4 --repeats 2
run 75 ppo_iteration --shape 1B --dtype bfloat16 --episodes 32 --prompt 128 --new 128 --accumulation 8 --remat --repeats 2
"$python" - "$out" <<'PY'
import json, statistics, sys
ending, ratios = "measured_over_estimated", {}
for line in map(json.loads, open(sys.argv[1], encoding="utf-8")):
    for name, ratio in line.items():
        if name.endswith(ending):
            part = f"{line['figure']} {name.removesuffix(ending).rstrip('_')}".strip()
            ratios.setdefault(part, []).append(ratio)
for part, values in ratios.items():
    print(f"gpu.sh: {part}: measured {statistics.median(values):.2f} times the estimate, {len(values)} programs", file=sys.stderr)
PY
exit "$failed"
