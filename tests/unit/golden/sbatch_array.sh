#!/bin/bash

# Parameters
#SBATCH --account='it'"'"'s mine'
#SBATCH --array=0-2%2
#SBATCH --constraint='a100&ib'
#SBATCH --cpus-per-task=8
#SBATCH --error=/FOLDER/%A_%a_0_log.err
#SBATCH --exclude=node1
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --hint=nomultithread
#SBATCH --job-name=pbc-pretrain
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=1536M
#SBATCH --no-requeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/FOLDER/%A_%a_0_log.out
#SBATCH --partition=big
#SBATCH --qos=normal
#SBATCH --reservation=course
#SBATCH --signal=USR2@120
#SBATCH --time=90

# setup
set -eo pipefail
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
rm -f /FOLDER/.requeue-$job
trap 'if [ -e /FOLDER/.requeue-$job ]; then scontrol requeue "$job"; fi' EXIT
module load cuda
export OMP_NUM_THREADS=8
export NOTE='two words $HOME'

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /FOLDER/%A_%a_%t_log.out --error /FOLDER/%A_%a_%t_log.err --cpus-per-task=8 --kill-on-bad-exit=1 apptainer exec --nv 'my image.sif' python3 -c 'import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM]); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])' -u -m submitit.core._submit /FOLDER
