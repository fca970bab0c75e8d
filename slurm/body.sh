# shellcheck shell=bash
# What the batch scripts of this folder share. They are copied by sbatch, this file is not: it is read where it lies.
#
#   train_stage STAGE OVERRIDES...    compose, check, train; goes on after a requeue; decides about the next one
#   train_stage STAGE --run-dir DIR   the same for a run directory that is there already (a chain's link)
#   train_stage STAGE --sweep DIR     the same for element $SLURM_ARRAY_TASK_ID of a sweep
#   evaluate, prepare_data            run once to the end; SLURM's own requeue restarts them
#
# Files in RUN_DIR by which shell and workers talk: STOP (please stop), STOPPED (stopped, checkpoint written), DONE
# (finished), and the shell's own FAILED (why it gave up) and crashes (one line per crash).
set -uo pipefail

VLORA_SITE=${VLORA_SITE:-$VLORA_ROOT/slurm/site.sh}
if [ -f "$VLORA_SITE" ]; then
    # shellcheck disable=SC1090
    source "$VLORA_SITE"
fi
if declare -F site_environment >/dev/null; then site_environment; fi
# The repository's own environment, unless the site's profile chose another Python.
if [ -z "${VLORA_PYTHON:-}" ]; then
    VLORA_PYTHON=python
    [ -x "$VLORA_ROOT/.venv/bin/python" ] && VLORA_PYTHON=$VLORA_ROOT/.venv/bin/python
fi

# In the last element of an array SLURM_JOB_ID is the id of the whole array: a requeue by it would hit all elements.
JOB=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then JOB=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi
RESTARTS=${SLURM_RESTART_COUNT:-0}
RUN_DIR=
STEP_PID=

log() { printf '[slurm %s job %s start %s] %s\n' "$(date +%FT%T)" "$JOB" "$RESTARTS" "$*"; }

# Everything that a rank finds in its environment.
export_environment() {
    # Here, on the host: a container has no scontrol.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    [ -n "$MASTER_ADDR" ] || give_up "scontrol does not name the first host of $SLURM_JOB_NODELIST"
    # From the job's id, so that two jobs on one node do not meet.
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
    # Each rank may use its own cores and no more; half of them, since the loader's threads need the rest.
    local cores=${SLURM_CPUS_PER_TASK:-2}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}
    # Warnings only. Tuning variables belong into the site's profile and only where measured: NCCL's defaults know the
    # topology better, and what helps one cluster slows the next. Its asynchronous error handling is torch's default.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export PYTHONPATH=$VLORA_ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
    # On the node's own disk: hundreds of ranks compiling into one shared folder wait for its locks.
    if [ -n "${VLORA_SCRATCH:-}" ]; then
        export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$VLORA_SCRATCH/vlora-$UID/triton}
        export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$VLORA_SCRATCH/vlora-$UID/extensions}
    fi
}

# Container of the site: options of srun (pyxis) or words before the command (apptainer).
CONTAINER_OPTIONS=()
CONTAINER_COMMAND=()
mounts=$VLORA_ROOT${VLORA_CACHE:+,$VLORA_CACHE}${VLORA_SCRATCH:+,$VLORA_SCRATCH}${VLORA_MOUNTS:+,$VLORA_MOUNTS}
case ${VLORA_CONTAINER:-none} in
    none) ;;
    apptainer) CONTAINER_COMMAND=(apptainer exec --nv --bind "$mounts" --pwd "$VLORA_ROOT" "$VLORA_IMAGE") ;;
    pyxis)
        # pyxis wants SRC:DST
        CONTAINER_OPTIONS=("--container-image=$VLORA_IMAGE" "--container-workdir=$VLORA_ROOT"
            "--container-mounts=$(sed -E 's/([^,]+)/\1:\1/g' <<<"$mounts")")
        ;;
    *)
        echo "error: VLORA_CONTAINER=$VLORA_CONTAINER in $VLORA_SITE: choose none, apptainer or pyxis" >&2
        exit 2
        ;;
esac

# Run a Python module on every task of the job.
#
# --kill-on-bad-exit: one dead rank ends all, which would wait for it in a collective otherwise.
# --cpus-per-task: srun does not take it over from sbatch any more. --cpu-bind=cores: a rank stays on its cores, next
# to the memory it has touched.
# exec: with process tracking by cgroup SLURM signals only the process it started, so that must become Python itself.
# trap: an ignored signal stays ignored through exec, so none kills Python before it has its own handlers; what is lost
# that way is in the file STOP.
on_all_tasks() {
    srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind=cores "${CONTAINER_OPTIONS[@]}" \
        bash -c 'trap "" USR1 TERM; exec "$@"' _ "${CONTAINER_COMMAND[@]}" "$VLORA_PYTHON" -m "$@" &
    # srun itself, not a shell around it: signals are passed on to this process.
    STEP_PID=$!
    while kill -0 "$STEP_PID" 2>/dev/null; do wait "$STEP_PID"; done # a signal interrupts `wait`
    wait "$STEP_PID"
    local code=$?
    STEP_PID=
    return "$code"
}

# Run a Python module once, on the first node.
on_first_node() {
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$MASTER_ADDR" \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${CONTAINER_OPTIONS[@]}" \
        "${CONTAINER_COMMAND[@]}" "$VLORA_PYTHON" -m "$@"
}

# Pass a signal on to all ranks, and leave the file for one that is not ready to take it.
on_signal() {
    log "got SIG$1: asking the workers to stop"
    if [ -n "$RUN_DIR" ]; then echo "SIG$1 to job $JOB" >"$RUN_DIR/STOP"; else STOP_EARLY=$1; fi
    if [ -n "$STEP_PID" ]; then kill -USR1 "$STEP_PID" 2>/dev/null; fi
}
STOP_EARLY=

job_state() { squeue --noheader --jobs="$JOB" --format=%T 2>/dev/null | head -n 1; }

give_up() {
    log "error: $*"
    if [ -n "$RUN_DIR" ] && [ -d "$RUN_DIR" ]; then printf '%s\n' "$*" >"$RUN_DIR/FAILED"; fi
    exit 1
}

requeue() {
    local limit=${VLORA_MAX_REQUEUES:-100}
    [ "$RESTARTS" -lt "$limit" ] || give_up "$1; not requeued: VLORA_MAX_REQUEUES=$limit is reached"
    log "$1; requeueing"
    # From here on the job is as good as gone; a shell that waits now only keeps the nodes from being freed.
    trap '' TERM USR1
    scontrol requeue "$JOB" || give_up "$1, but SLURM refuses to requeue it (submitted with --no-requeue?)"
    exit 0
}

last_step() {
    local step
    step=$(grep -o '"step": [0-9]*' "$RUN_DIR/metrics.jsonl" 2>/dev/null | tail -n 1)
    echo "${step##* }" | grep . || echo 0
}

# Decide what becomes of a job whose workers have ended with code $1.
after_workers() {
    local code=$1 state step previous
    if [ -e "$RUN_DIR/DONE" ]; then
        log "finished: $RUN_DIR"
        exit 0
    fi
    state=$(job_state)
    if [ "$state" != RUNNING ]; then
        log "the job is ${state:-gone}: cancelled, or requeued by SLURM itself; nothing to do here"
        exit "$code"
    fi
    if [ -e "$RUN_DIR/STOPPED" ]; then requeue "stopped with a checkpoint ($(cat "$RUN_DIR/STOPPED"))"; fi
    [ "$code" -ne 0 ] || give_up "the workers ended without DONE or STOPPED in $RUN_DIR"
    # 2: the worker's way to say that only the user can put it right.
    [ "$code" -ne 2 ] || give_up "the workers ended with an error that a restart does not cure; see above"
    step=$(last_step)
    previous=$(tail -n 1 "$RUN_DIR/crashes" 2>/dev/null | cut -d ' ' -f 1)
    printf '%s exit code %s, %s, job %s start %s\n' "$step" "$code" "$(date +%FT%T)" "$JOB" "$RESTARTS" >>"$RUN_DIR/crashes"
    if [ -n "$previous" ] && [ "$step" -le "$previous" ]; then
        give_up "crashed at step $step (exit code $code), no further than the crash before (step $previous); not requeued"
    fi
    requeue "crashed at step $step (exit code $code)"
}

preflight() {
    if [ "${VLORA_PREFLIGHT:-1}" = 0 ]; then return; fi
    # Its own port: the sockets of its rendezvous linger for a moment.
    MASTER_PORT=$((MASTER_PORT + 20000)) on_all_tasks train.preflight "$@"
}

# Sets RUN_DIR: composes the configuration, on the job's first start only. What a requeued job runs must not depend on
# what has happened to conf/ since.
compose() {
    local stage=$1 record=${VLORA_LOGS:-$VLORA_ROOT/slurm/logs}/$JOB.run_dir output
    shift
    if [ "$RESTARTS" -gt 0 ] && [ -s "$record" ]; then
        RUN_DIR=$(cat "$record")
        return
    fi
    # Ours come first: of two values for one key the later one counts. The name is the job's, so a job that is requeued
    # before this has ended finds the same directory.
    # shellcheck disable=SC2016
    output=$(on_first_node train launch=slurm "launch.workers=$SLURM_NTASKS" "stage=$stage" \
        'run_dir=${output_root}/'"$stage-$JOB" "$@") || give_up "the configuration was refused; see above"
    printf '%s\n' "$output"
    RUN_DIR=$(sed -n 's/^run directory: //p' <<<"$output")
    [ -n "$RUN_DIR" ] || give_up "the front end named no run directory"
    RUN_DIR=$(realpath "$RUN_DIR")
    printf '%s\n' "$RUN_DIR" >"$record"
}

train_stage() {
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    export_environment
    log "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), $SLURM_NTASKS tasks, first host $MASTER_ADDR"
    case ${2:-} in
        --run-dir) RUN_DIR=$3 ;;
        --sweep) RUN_DIR=$3/$SLURM_ARRAY_TASK_ID ;;
        *) compose "$@" ;;
    esac
    if [ -e "$RUN_DIR/DONE" ]; then
        log "finished before: $RUN_DIR"
        exit 0
    fi
    rm -f "$RUN_DIR/STOP" "$RUN_DIR/STOPPED" "$RUN_DIR/FAILED"
    if [ -n "$STOP_EARLY" ]; then echo "SIG$STOP_EARLY to job $JOB" >"$RUN_DIR/STOP"; fi
    preflight "$RUN_DIR" || {
        [ "$(job_state)" = RUNNING ] || exit 1
        [ -e "$RUN_DIR/STOP" ] && requeue "asked to stop before the training began"
        give_up "preflight found the machine unfit; see above"
    }
    on_all_tasks train.worker "$RUN_DIR"
    after_workers $?
}

evaluate() {
    export_environment
    if [ "${1:-}" = --sweep ]; then set -- "run=$2/$SLURM_ARRAY_TASK_ID" "${@:3}"; fi
    preflight || give_up "preflight found the machine unfit; see above"
    # Benchmarks are one process that starts a server per GPU; the rest are ranks.
    case " $*" in
        *" suite="* | *" tasks="*) on_first_node train.benchmark "$@" ;;
        *) on_all_tasks train.evaluate "$@" ;;
    esac
}

prepare_data() {
    export_environment
    preflight || give_up "preflight found the machine unfit; see above"
    on_first_node data_prep "workers=${SLURM_CPUS_PER_TASK:-1}" "$@" \
        "task=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT"
}
