#!/bin/bash
# The work of a SLURM job: start launch/train.py on all nodes, hand on requests to stop, and requeue the job.
#
#   exec bash launch/slurm/job.sh --config FILE [options of launch/train.py]    # in a batch script: see train.sbatch
#
# In an element of an array, %a in these words is the element's number.
#
# It is set by variables:
#   LAUNCHER             torchrun (by default) or deepspeed
#   PROCESSES_PER_NODE   processes on each node; by default as many as the job has GPUs there, or 1
#   MOST_STALLED_STARTS  starts in a row from the same checkpoint (3), after which the job is not requeued any more
#   MAX_RESTARTS         restarts of all processes in place by torchrun, before the job fails (0)
#   PYTHON               Python with this project's packages (python)
#   CONTAINER_RUNTIME    none (by default), apptainer, or pyxis, which is Enroot's part of SLURM
#   CONTAINER_IMAGE, CONTAINER_MOUNTS    its image, and mounts A:B,C:D
#   CONTAINER_ENV        names of variables, A,B, that keep their values in the container, whatever its image sets
#
# How it ends. SLURM signals this shell only (--signal=B:USR1@SECONDS), which leaves a file STOP in the run's folder.
# Rank 0 looks for it, all ranks leave after the same step and save, and rank 0 writes STOPPED, or DONE after the last
# step. These files decide, not exit codes: torchrun's is 1 after a signal. No signal is sent to the steps of the job, as
# processes that know no handler would die of it.
#
#   DONE                       the job is complete
#   STOPPED                    it requeues itself, and goes on from the checkpoint
#   neither, but a newer checkpoint than at the start: it failed on the way, and requeues itself too
#   neither: it failed         it ends with the exit code
#   SIGTERM came to this shell (scancel, time limit), or the state is not RUNNING: it ends; SLURM knows what comes next
set -uo pipefail

message() { echo "job.sh: $(date '+%F %T') $*"; }

# Read the run's folder and that of its checkpoints out of the settings; wrong ones end the job before it uses a GPU.
find_folders() {
    local found
    # The last two lines: an image may greet whoever enters it.
    found=$("${beside[@]}" "$python" -m gptoss_dist.cluster "${arguments[@]}" | tail -n 2) || exit 2
    { read -r run && read -r checkpoints; } <<<"$found"
    mkdir -p "$run" || exit 2
}

# Print the step of the newest complete checkpoint; 0 if there is none.
newest_step() {
    local path step newest=0
    for path in "$checkpoints"/step_*; do
        step=${path##*/step_}
        [[ $step =~ ^[0-9]+$ ]] && ((10#$step > newest)) && newest=$((10#$step))
    done
    echo "$newest"
}

# Print how many of the job's last starts began at this step. The file has a line for each: job, start, step, time.
starts_from() {
    awk -v job="$job" -v step="$1" '$1 == job { n = $3 == step ? n + 1 : 0 } END { print n + 0 }' "$starts" 2>/dev/null
}

check_progress() {
    local count
    count=$(starts_from "$(newest_step)")
    ((${count:-0} < most_stalled)) && return
    message "$count starts in a row began at step $(newest_step): not requeued any more; see the messages above, and" \
        "submit the job again with --resume auto"
    return 1
}

# Set `beside`, what runs a command on this node, and `steps`, the options of srun that run one on all of them.
enter_container() {
    beside=() steps=() inside=()
    local mounts=${CONTAINER_MOUNTS:+$CONTAINER_MOUNTS,}$root,$PWD
    [[ ${CONTAINER_RUNTIME:-none} = none ]] && return
    # Packages of the host, in paths and in the user's home, are not those of the image.
    export PYTHONPATH=$root PYTHONNOUSERSITE=1
    case $CONTAINER_RUNTIME in
        apptainer)
            inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "${CONTAINER_IMAGE:?is not set}")
            beside=("${inside[@]}")
            ;;
        pyxis)
            mounts=$root:$root,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
            steps=(--container-image "${CONTAINER_IMAGE:?is not set}" --container-mounts "$mounts"
                --container-workdir "$PWD" --no-container-mount-home
                # Of variables that the image sets too, Pyxis takes the image's, but for these (NVIDIA/pyxis#124).
                "--container-env=PYTHONPATH,PYTHONNOUSERSITE${CONTAINER_ENV:+,$CONTAINER_ENV}")
            beside=(srun --nodes 1 --ntasks 1 --nodelist "$head" "${steps[@]}")
            ;;
        *)
            message "CONTAINER_RUNTIME=$CONTAINER_RUNTIME is not known; give none, apptainer or pyxis" >&2
            exit 2
            ;;
    esac
}

# Set `command`, which each node runs; @NODE_RANK@ stands for the node's number, which only the node knows.
choose_launcher() {
    local port=$((10000 + SLURM_JOB_ID % 20000)) hosts
    case ${LAUNCHER:-torchrun} in
        torchrun)
            # Static: the store is on the first node, rank 0's. Its own store for each restart, or agents that have
            # restarted a different number of times would not meet.
            export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
            command=("$python" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes"
                --node-rank @NODE_RANK@ --master-addr "$head" --master-port "$port"
                --max-restarts "${MAX_RESTARTS:-0}")
            ;;
        deepspeed)
            hosts=$run/hosts-$job
            scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$processes/" >"$hosts"
            command=("$python" -m deepspeed.launcher.runner --hostfile "$hosts" --no_ssh --node_rank @NODE_RANK@
                --master_addr "$head" --master_port "$port")
            ;;
        *)
            message "LAUNCHER=$LAUNCHER is not known; give torchrun or deepspeed" >&2
            exit 2
            ;;
    esac
    command=("${inside[@]}" "${command[@]}" "$root/launch/train.py" "${arguments[@]}")
}

# Start the step, and wait for it, however often a signal interrupts the waiting.
train() {
    # torchrun and deepspeed would die of a USR1 that somebody sends to the step; the ranks have a handler for it.
    # shellcheck disable=SC2016  # the nodes expand it
    local start='trap "" USR1 USR2; exec "${@/#@NODE_RANK@/$SLURM_NODEID}"'
    # One task on each node, whatever the job asked for, and on all of the node's processors: it starts the ranks.
    srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --cpu-bind=none \
        --kill-on-bad-exit=1 --wait=60 "${steps[@]}" bash -c "$start" bash "${command[@]}" &
    local step=$!
    while :; do
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break
    done
}

requeue() {
    message "requeue at step $(newest_step): $1"
    scontrol requeue "$job" || return 1
    # SLURM ends this script now. Should it not, the job must not look complete.
    for _ in $(seq 120); do
        ((terminated)) && exit 0
        sleep 1
    done
    message "SLURM took the request to requeue and did not act on it"
    return 1
}

main() {
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    python=${PYTHON:-python} processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    most_stalled=${MOST_STALLED_STARTS:-3}
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    # Ranks get so long to finish a step and save, after a SIGTERM that torchrun hands on; SLURM's limits count anyway.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
    # The ranks get this environment, even if the job was submitted with --export=NONE.
    export SLURM_EXPORT_ENV=ALL
    if [[ ${SLURM_NTASKS_PER_NODE:-1} != 1 ]]; then
        message "--ntasks-per-node=$SLURM_NTASKS_PER_NODE: it must be 1, as one launcher on each node starts all ranks" \
            "there; give --cpus-per-task the processors of all of them" >&2
        exit 2
    fi
    # Since 22.05 srun does not know what sbatch was told of processors.
    [[ -n ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    arguments=("$@") job=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        # SLURM_JOB_ID of an array's last element is the id of the whole array: requeued by it, all elements would be.
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        arguments=("${@//%a/$SLURM_ARRAY_TASK_ID}")
    fi
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    local asked=0
    trap 'asked=1' USR1 # with a container, what follows may take minutes
    enter_container
    find_folders
    starts=$run/starts.txt terminated=0 code=0
    rm -f "$run/STOP" "$run/STOPPED" "$run/DONE"
    trap 'message "asked to stop: writing $run/STOP"; : >"$run/STOP"' USR1
    trap 'message "SIGTERM"; terminated=1' TERM
    ((asked)) && : >"$run/STOP"

    local first restart=${SLURM_RESTART_COUNT:-0} state
    first=$(newest_step)
    if ((restart)); then
        check_progress || exit 1 # SLURM itself requeues after the failure of a node, perhaps of the same one each time
        # If no start of this job got as far as to train, the words still say where it begins. See train/start.py.
        ((first)) && grep -qsx "job $job" "$run/.launch" && arguments+=(--resume auto)
    fi
    echo "$job $restart $first $(date '+%F %T')" >>"$starts"
    message "job $job, start $restart, on $SLURM_JOB_NODELIST, from step $first; code $(git -C "$root" describe \
        --always --dirty --abbrev=12 2>/dev/null || echo unknown)"
    choose_launcher
    train

    [[ -e $run/DONE ]] && { message "done"; exit 0; }
    for _ in $(seq 12); do # its controller may be restarting
        state=$(squeue -h -t all -j "$job" -o %T) && [[ -n $state ]] && break
        ((terminated)) && break
        sleep 5
    done
    if ((terminated)) || [[ $state != RUNNING ]]; then
        message "ended with code $code in state $state"
        exit $((code ? code : 143))
    fi
    check_progress || exit $((code ? code : 1))
    if [[ -e $run/STOPPED ]]; then
        requeue "it was asked to stop"
    elif (($(newest_step) != first)); then # less, if the run went back before it failed
        requeue "it failed with code $code, after it had saved"
    fi
    message "failed with code $code at step $(newest_step)"
    exit $((code ? code : 1))
}

# The last line, and `main` always exits: bash has read the whole file by then, and whoever edits it changes no job.
main "$@"
