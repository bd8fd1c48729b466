# One task of a job: what torchrun would say to its rank, from what Slurm says to its task, then the program in its place.
source slurm/site.sh
prepare_node
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS-$CPUS_PER_RANK}
# exec: signals reach python itself.
exec python -u "$@"
