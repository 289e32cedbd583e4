#!/usr/bin/env bash
#SBATCH --job-name=streamconv-part
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=4:00:00
#SBATCH --output=streamconv-%A-%a.log
#
# One large conversion on several nodes, which share the paths of PLAN's checkpoint and of DST:
#
#   streamconv plan SRC -o plan.jsonl && streamconv begin plan.jsonl DST
#   parts=$(sbatch --parsable --array=1-8 slurm-parts.sh DST)
#   sbatch --dependency=afterok:$parts --wrap "streamconv finish DST"
#
# What failed or was preempted is submitted again in the same way: finished files are passed over.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch --array=1-N slurm-parts.sh DST [options of streamconv part]" >&2
    exit 2
fi
memory=()
if [ -n "${SLURM_MEM_PER_NODE:-}" ]; then
    memory=(--max-mem "$((SLURM_MEM_PER_NODE * 9 / 10))MiB")
fi
exec "${STREAMCONV:-streamconv}" part "$@" --part auto "${memory[@]}"
