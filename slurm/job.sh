# What the job scripts share; they source this from the repository's root.
set -uo pipefail
source slurm/site.sh

# "Told to stop, all is saved" (mining/stopping.py).
EXIT_STOPPED=85

# on_every_rank ARGUMENTS...: python with these on every task of the job, as ranks that find each other.
on_every_rank() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The address that Slurm itself uses; a node's name need not resolve.
    MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
    export MASTER_ADDR MASTER_PORT
    # No --kill-on-bad-exit: it kills ranks that are about to leave by themselves after a signal. A rank that fails takes the others
    # down itself; --wait ends those that never met. Shorter, and it would kill ranks that leave with the code of a mistake after rank 0.
    srun --kill-on-bad-exit=0 --wait=30 --cpus-per-task="$CPUS_PER_RANK" bash slurm/rank.sh "$@"
}

# with_node_cache FLAG ARGUMENTS...: the arguments, one a line, and FLAG with a folder on the node's own disk when a store is remote.
with_node_cache() {
    local flag=$1 argument previous=""
    shift
    printf '%s\n' "$@"
    for argument in "$@"; do
        [[ $previous == --*store && $argument == *://* ]] && printf '%s\n' "$flag" "$NODE_CACHE/$(basename "$argument")"
        previous=$argument
    done
}

# finish CODE: end the job; one that was told to stop goes back to the queue and on from where it was.
finish() {
    if [[ $1 == "$EXIT_STOPPED" && ${SLURM_RESTART_COUNT:-0} -lt $MAX_RESTARTS ]]; then
        echo "told to stop: job $SLURM_JOB_ID goes back to the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
        # The controller ends this script when it takes the job back. It does not where requeueing is forbidden.
        scontrol requeue "$SLURM_JOB_ID" && sleep 300
    fi
    exit "$1"
}
