#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Which router is best: trains every cell of configs/ablate/routers.py and
# prints the table. With the embedded base and data about 15 minutes on two
# cores.
#
#   bash scripts/ablate_routers.sh [OUT] [--config.key=value ...]
#
# OUT       where the runs go: workdirs/ablation unless it is said.
# --config  what every run changes; other data and another base, for example:
#
#   bash scripts/ablate_routers.sh workdirs/ablation_p3 \
#     --config.model.path=/models/flan-t5-small --config.data.source=jsonl \
#     --config.data.path=rows.jsonl.gz --config.steps=50
#
# From the environment:
#
# SEEDS   of each cell, '0' unless it is said: SEEDS='0 1 2' bash scripts/...
# CELLS   some cells alone, 'softmax top2'; `python configs/ablate/routers.py`
#         lists them all.
# PYTHON  another than `python`.
#
# A run that is whole is left as it is where the flags are the same; one that
# was cut short goes on. Other flags need another OUT (moepeft.train says which
# key differs), or more --config.steps.
set -euo pipefail

case "${1-}" in
  -h | --help)
    sed -n '3,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
refuse() {
  echo "error: $*" >&2
  exit 2
}
out=workdirs/ablation
if [[ $# -gt 0 && $1 != -* ]]; then
  out=$1
  shift
  [[ -n $out ]] || refuse "OUT is empty; name a folder, or leave it out"
fi
for word; do
  [[ $word == -* ]] ||
    refuse "unexpected argument '$word'; OUT comes first and options are" \
      "--config.key=value"
done
python=${PYTHON:-python}
card=configs/ablate/routers.py
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

listed=$("$python" "$root/$card")
cells=${CELLS:-$(cut -f 1 <<< "$listed")}
# Before anything is trained: a wrong name would be met after minutes.
for cell in $cells; do
  if ! cut -f 1 <<< "$listed" | grep -qxF -- "$cell"; then
    refuse "there is no cell '$cell' in $card;" \
      "there are" $(cut -f 1 <<< "$listed")
  fi
done
# A run that is given twice would be two rows of the table.
for words in "SEEDS ${SEEDS:-0}" "CELLS $cells"; do
  again=$(tr -s '[:space:]' '\n' <<< "$words" | sort | uniq -d)
  [[ -z $again ]] ||
    refuse "${words%% *} has" $again "more than once; name each once"
done

runs=()
for seed in ${SEEDS:-0}; do
  for cell in $cells; do
    run=$out/${cell}_seed$seed
    runs+=("$run")
    # What the run is a function of, but for the code: written when it is whole.
    made_by=$(
      grep "^$cell"$'\t' <<< "$listed"
      printf '%s\n' "--config.seed=$seed" "$@"
    )
    if [[ -f $run/made_by && $(< "$run/made_by") == "$made_by" ]]; then
      echo "== $cell, seed $seed: done before"
      continue
    fi
    echo "== $cell, seed $seed"
    # moepeft.evaluate measures more than training does at its end.
    {
      "$python" -m moepeft.train --config="$root/$card:name=$cell" \
        --workdir="$run" --config.seed="$seed" \
        --config.evaluation.after=False "$@" &&
        "$python" -m moepeft.evaluate --workdir="$run"
    } || {
      code=$?
      echo "error: the cell '$cell' with seed $seed failed; see above" >&2
      exit "$code"
    }
    echo "$made_by" > "$run/made_by"
  done
done

"$python" -m moepeft.tables "${runs[@]}" --routing
