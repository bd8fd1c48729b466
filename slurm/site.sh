# What differs from site to site, in one place: every script of this folder reads it. Each value can also come from the environment.

# Passed to sbatch as it is: partition, account, time limit, constraints.
SBATCH_OPTIONS=${SBATCH_OPTIONS-"--time=24:00:00"}

# The shape of training and mining jobs. One rank a GPU; CPUs of a rank feed its data workers.
NODES=${NODES-2}
RANKS_PER_NODE=${RANKS_PER_NODE-8}
CPUS_PER_RANK=${CPUS_PER_RANK-12}
# How the site calls its GPUs, for all of a node's ranks together; empty on CPU nodes.
GPU_OPTIONS=${GPU_OPTIONS-"--gpus-per-node=$RANKS_PER_NODE"}

# Seconds before the time limit at which ranks save and leave: longer than the longest step and one checkpoint.
SIGNAL_SECONDS=${SIGNAL_SECONDS-300}
# A job that was told to stop goes back to the queue, at most so often.
MAX_RESTARTS=${MAX_RESTARTS-100}

# Where job output goes.
LOG_FOLDER=${LOG_FOLDER-slurm-logs}
# A disk of each node's own, for what is fetched of a remote store; all ranks of a node share it and later jobs find it.
NODE_CACHE=${NODE_CACHE-"${TMPDIR:-/tmp}/hardpair-$(id -un)"}

# Run on every node before python: modules, environment, network settings.
prepare_node() {
    # module load cuda
    # export NCCL_SOCKET_IFNAME=ib0
    source .venv/bin/activate
}
