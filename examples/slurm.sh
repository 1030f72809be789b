#!/bin/bash
# Runs a recipe on all GPUs of a Slurm job, by one torchrun on each node:
#
#     sbatch examples/slurm.sh RECIPE OUTPUT [OPTIONS of auxin run]
#
# Three minutes before the job's time is over, or when it is preempted with a grace time, Slurm sends SIGTERM to the
# processes of the step. They finish their step of training, save and end, and the job goes back into the queue, to go on
# from there. By hand: scancel --signal=TERM JOB. A job that is cancelled (scancel JOB) stays cancelled, and keeps what was
# saved before: srun, which is signalled with it, kills its processes.
#
#SBATCH --job-name=auxin
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=auxin-%j.log

set -u
export SAVED_ON_REQUEST=75
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# Seconds until torchrun kills what has not saved: fewer than those of --signal, and than the GraceTime of a preemption.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150

# What each node does. torchrun ends with 1 whatever happened, so that whoever stands around it has to know the reason.
node() {
    asked=
    trap 'asked=yes' TERM
    torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m auxin run "$1" --output "$2" "${@:3}" &
    # A signal ends the wait and not torchrun, which has it from Slurm, too.
    while wait $!; code=$?; kill -0 $! 2>/dev/null; do :; done
    [ "$code" -ne 0 ] && [ -n "$asked" ] && exit "$SAVED_ON_REQUEST"
    exit "$code"
}

# Where this script is signalled, too, it has to live until the processes have saved. It passes nothing on to srun, which
# kills its processes when it gets SIGTERM.
trap : TERM
srun --wait=300 bash -c "$(declare -f node)"'; node "$@"' node "$@"
code=$?
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
if [ "$code" -eq "$SAVED_ON_REQUEST" ] && [ "$state" = RUNNING ]; then
    echo "Saved; back into the queue."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
