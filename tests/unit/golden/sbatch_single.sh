#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterok:1:2_3,afterany:4
#SBATCH --error=/FOLDER/%j_0_log.err
#SBATCH --job-name=test
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/FOLDER/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=600

# setup
set -eo pipefail
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
rm -f /FOLDER/.requeue-$job
trap 'if [ -e /FOLDER/.requeue-$job ]; then scontrol requeue "$job"; fi' EXIT
export OMP_NUM_THREADS=1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /FOLDER/%j_%t_log.out --error /FOLDER/%j_%t_log.err --cpus-per-task=1 --kill-on-bad-exit=1 /PYTHON -c 'import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM]); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])' -u -m submitit.core._submit /FOLDER
