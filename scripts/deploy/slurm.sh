#!/usr/bin/env bash
#SBATCH --job-name=streamconv
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --output=streamconv-%j.log
# A first SIGTERM a minute before the time is up: what is being converted goes on in the next job.
#SBATCH --signal=B:TERM@60
#
# One round:                 sbatch slurm.sh /runs/my-run /models/my-run --model actor
# Beside a training job:     sbatch slurm.sh /runs/my-run /models/my-run --model actor --watch 10m
# After a training job:      sbatch --dependency=afterany:JOBID slurm.sh …
# Several nodes at once:     sbatch --array=0-3 slurm.sh …      (they share the work)
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch slurm.sh ROOT DST [options of streamconv batch], or: sbatch slurm.sh jobs.toml" >&2
    exit 2
fi
# Slurm tells megabytes (2^20). A tenth is left for the page cache that some clusters count too.
memory=()
if [ -n "${SLURM_MEM_PER_NODE:-}" ]; then
    memory=(--max-mem "$((SLURM_MEM_PER_NODE * 9 / 10))MiB")
fi
# exec, so that Slurm's signal reaches streamconv itself.
exec "${STREAMCONV:-streamconv}" batch "$@" "${memory[@]}"
