#!/usr/bin/env bash
# What the tests of this folder need of the system: Slurm, munge, an ssh server and pdsh, from Debian, without starting any of them.
set -euo pipefail
needed=(slurmctld slurmd sbatch srun scontrol munged sshd pdsh)
export PATH=$PATH:/usr/sbin:/sbin
missing() {
    local program
    for program in "${needed[@]}"; do command -v "$program" > /dev/null || echo "$program"; done
}
[[ -z $(missing) ]] && exit 0
if [[ $(id -u) != 0 ]] || ! command -v apt-get > /dev/null; then
    echo "make test-slurm: not installed: $(missing | xargs). It needs root on Debian or Ubuntu to install them" >&2
    exit 1
fi
# Its packages would start their daemons; those of the tests run in folders of their own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
log=$(mktemp)
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh procps; } > "$log" 2>&1; then
    tail -n 20 "$log" >&2
fi
if [[ -n $(missing) ]]; then
    echo "make test-slurm: the packages could not be installed, these programs are missing: $(missing | xargs)" >&2
    exit 1
fi
