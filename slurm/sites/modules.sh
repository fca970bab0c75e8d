# shellcheck shell=bash
# Site profile, first kind: modules and the repository's own environment. Copy to slurm/site.sh and edit; every setting
# is explained in slurm/site.example.sh.
export SBATCH_PARTITION=gpu
export VLORA_CACHE=${VLORA_CACHE:-$PWD/.cache}      # on the shared file system
export VLORA_SCRATCH=${VLORA_SCRATCH:-/tmp}         # the node's own disk
export VLORA_WANDB=online                           # compute nodes reach the internet
export VLORA_CONTAINER=none

site_environment() {
    # The environment of `make venv`, made on a login node with the same modules; nvcc builds DeepSpeed's optimizer and
    # the CUDA merge on each node once.
    if command -v module >/dev/null; then module load cuda/12.8 gcc; fi
}
