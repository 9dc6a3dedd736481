#!/bin/sh
# From nothing to a trained toy model and text from it: install, prepare data, train, generate. Needs no account and no
# GPU, and no network beyond the package index. Safe to repeat: finished steps are skipped, training resumes.
#
#   sh launch/quickstart.sh                     about ten minutes on two free cores
#   sh launch/quickstart.sh --train.steps 60    a first look; any settings of training, except its name and folder
set -eu
case ${1-} in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${VIRTUAL_ENV:-$root/.venv}
run=runs/quickstart
cd "$root"

step() { printf '\n== %s\n' "$*"; }
die() {
    printf 'quickstart: error: %s\n' "$*" >&2
    exit 1
}

step "1/4 install"
sh launch/install.sh --venv "$venv" || die "the install failed; see the message above"
PATH=$venv/bin:$PATH

step "2/4 prepare data: the Python standard library's own source code"
python -m data_pipeline.prepare pystdlib --output data/pystdlib --tokenizer builtin ||
    die "the data could not be prepared; see the message above"

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ "$gpus" -gt 0 ] && python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    processes=$gpus
    step "3/4 train on $processes GPU(s)"
else
    processes=2
    # Two processes share the cores: more threads than cores would make them wait for each other.
    threads=$(($(getconf _NPROCESSORS_ONLN) / processes))
    OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
    export OMP_NUM_THREADS
    step "3/4 train on the CPU: $processes processes, $OMP_NUM_THREADS thread(s) each"
fi
trap 'printf "\nquickstart: interrupted; what was trained is saved, and the same command goes on\n" >&2; exit 130' INT
steps=$(sed -n 's/^  steps: *//p' configs/quickstart.yaml)
done_step=$(sed -n 's/.*"step": *\([0-9]*\).*/\1/p' "$run/DONE" 2>/dev/null || true)
if [ "$#" -eq 0 ] && [ "${done_step:-0}" -ge "$steps" ]; then
    echo "$run is trained already, to step $done_step"
else
    torchrun --standalone --nproc_per_node "$processes" launch/train.py --config configs/quickstart.yaml --resume auto "$@" ||
        die "training failed; the reason is above. If it was interrupted, repeating this script resumes from the last checkpoint"
fi

trap - INT

step "4/4 generate"
unset OMP_NUM_THREADS
python launch/generate.py --checkpoint "$run" --prompt 'def ' --prompt 'import os
' || die "generating from $run failed; see the message above"

cat <<END

== done
  run          $run            (config.yaml, metrics.jsonl, log.txt, samples/)
  report       $run/report.html    (curves, samples, events: open it in a browser, or forward it)
  plots        $run/plots/
  checkpoints  $run/checkpoints/
  MLflow       mlflow.db

Next:
  . $venv/bin/activate
  python launch/generate.py --checkpoint $run                       # type prompts yourself
  mlflow ui --backend-store-uri sqlite:///mlflow.db                 # curves in the browser, http://127.0.0.1:5000
  torchrun --standalone --nproc_per_node $processes launch/train.py --config configs/quickstart.yaml --resume auto --train.steps 2000
                                                                    # train on from the last checkpoint
END
