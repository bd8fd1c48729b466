#!/usr/bin/env bash
# Submit one job with the site's settings and print its number: slurm/submit.sh [sbatch options] JOB [arguments of the job]
# JOB is pretrain, mine, refine or evaluate. From the repository's root.
set -euo pipefail
source slurm/site.sh
options=()
while [[ ${1:-} == -* ]]; do
    options+=("$1")
    shift
done
job=${1:?usage: slurm/submit.sh [sbatch options] pretrain|mine|refine|evaluate [arguments]}
shift
if [[ ! -f slurm/$job.sbatch ]]; then
    echo "error: slurm/$job.sbatch is no file; jobs are pretrain, mine, refine and evaluate, and this runs from the repository's root" >&2
    exit 2
fi
shape=(--nodes="$NODES" --ntasks-per-node="$RANKS_PER_NODE" $GPU_OPTIONS)
if [[ $job == evaluate ]]; then
    shape=(--nodes=1 --ntasks=1 ${GPU_OPTIONS:+--gpus-per-node=1})
fi
mkdir -p "$LOG_FOLDER"
# Without B: the signal goes to the ranks, not to the script around them.
exec sbatch --parsable $SBATCH_OPTIONS "${shape[@]}" --cpus-per-task="$CPUS_PER_RANK" --signal="USR1@$SIGNAL_SECONDS" \
    --output="$LOG_FOLDER/%x-%j.out" "${options[@]}" "slurm/$job.sbatch" "$@"
