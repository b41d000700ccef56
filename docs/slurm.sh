#!/bin/bash
# Training on several nodes under Slurm: sbatch docs/slurm.sh CONFIG [section.key=value ...]     (docs/cluster.md)
# Submit it in the checkout, which every node sees at the same path; options of sbatch before the script win over these.
#SBATCH --job-name=avslowfast
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=112
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Five minutes before the time is over, and on scancel --batch --signal=TERM: every rank ends the same step and saves,
# and the job queues up again. A node that fails ends the job; Slurm queues it again. A mistake or a failure does not.

set -u
cd "$SLURM_SUBMIT_DIR" || exit 2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
stopping=

stop() {
    stopping=1
    scancel --signal=TERM "$SLURM_JOB_ID.0"  # every torchrun, and that hands it to its ranks; srun itself would kill them
}

srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${RANKS_PER_NODE:-8}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$first:${PORT:-29500}" \
    -m experiments.train "$@" &
launch=$!
trap stop TERM
wait "$launch"
code=$?
while [ "$code" -gt 128 ] && kill -0 "$launch" 2>/dev/null; do  # a signal ended the wait, not srun
    wait "$launch"
    code=$?
done
if [ -n "$stopping" ]; then  # srun may have ended while the signal was taken in
    wait "$launch"
    code=$?
fi

if [ -n "$stopping" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$code"
