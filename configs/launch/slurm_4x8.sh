#!/bin/bash
# sbatch configs/launch/slurm_4x8.sh RUN.yaml [--set run.steps=...]
# Four machines of eight GPUs, one process on each GPU. Five minutes before the allocation ends every process gets SIGUSR1, saves and leaves with
# status 75; the job then queues itself again and goes on from there.
#SBATCH --job-name=halo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" TOKENIZERS_PARALLELISM=false
srun --kill-on-bad-exit=0 python -m halo.train.scale "$@"   # halo.train.scale reads Slurm's rank and size
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
