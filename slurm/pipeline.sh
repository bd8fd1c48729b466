#!/usr/bin/env bash
# The whole story as jobs that wait for each other: pretrain, mine, refine, and an evaluation of both models.
#
#   slurm/pipeline.sh --store data/cc12m --suite suites/imagenet.json --ds_config ds_configs/zero1_bf16.json --out work/cc12m \
#       --pretrain "cc12m-pretrain --model.name ViT-B-16" --refine "helip-refine --model.name ViT-B-16" [--mine "--k 50"]
#
# --pretrain and --refine: a recipe and its flags. When a job fails, those behind it are cancelled; one that is preempted goes back to the
# queue and they wait on.
set -euo pipefail
store="" suite="" ds_config="" out="" pretrain="" refine="" mine=""
while [[ $# -gt 0 ]]; do
    case $1 in
        --store | --suite | --ds_config | --out | --pretrain | --refine | --mine)
            declare "${1#--}=${2?$1 needs a value}"
            shift 2
            ;;
        *)
            sed -n '2,8s/^# \{0,1\}//p' "$0"
            [[ $1 == -h || $1 == --help ]] && exit 0
            echo "error: slurm/pipeline.sh does not know $1" >&2
            exit 2
            ;;
    esac
done
for name in store suite ds_config out pretrain refine; do
    if [[ -z ${!name} ]]; then
        echo "error: --$name is missing; slurm/pipeline.sh --help shows all" >&2
        exit 2
    fi
done

# after JOBS SUBMIT-ARGUMENTS...: a job that starts when JOBS have succeeded, and is cancelled when one has failed.
after() {
    local jobs=$1
    shift
    slurm/submit.sh --dependency="afterok:$jobs" --kill-on-invalid-dep=yes "$@"
}

# Recipes and their flags are split into words on purpose.
base=$(slurm/submit.sh pretrain $pretrain --data.store "$store" --ds_config "$ds_config" --out "$out/pretrained")
pairs=$(after "$base" mine "$out/pretrained" "$store" "$out/embeddings" "$out/pairs" $mine)
refined=$(after "$pairs" refine $refine --data.store "$store" --data.pairs "$out/pairs" --model.pretrained "$out/pretrained" \
    --ds_config "$ds_config" --out "$out/refined")
base_score=$(after "$base" evaluate --checkpoint "$out/pretrained" --suite "$suite")
refined_score=$(after "$refined" evaluate --checkpoint "$out/refined" --suite "$suite")
printf '%s %s\n' pretrain "$base" mine "$pairs" refine "$refined" evaluate "$base_score" evaluate "$refined_score"
