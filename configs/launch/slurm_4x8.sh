#!/bin/bash
# sbatch configs/launch/slurm_4x8.sh RUN.yaml [--set run.steps=...]
# Four machines of eight GPUs. Two minutes before the allocation ends every process gets SIGUSR1, saves and leaves; the job queues itself again and goes on.
#SBATCH --job-name=halo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=${MASTER_PORT:-29500}
export OMP_NUM_THREADS=4 TOKENIZERS_PARALLELISM=false
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d \
     --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT -m halo.scale "$@" &
job=$!
trap 'wait $job; scontrol requeue "$SLURM_JOB_ID"' USR1   # srun passes the signal on to its tasks
wait $job
