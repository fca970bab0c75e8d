# shellcheck shell=bash
# Site profile, second kind: Apptainer, compute nodes without internet. Copy to slurm/site.sh and edit; every setting is
# explained in slurm/site.example.sh. The image: containers/vlora.def.
export SBATCH_CONSTRAINT=a100
export VLORA_CACHE=${VLORA_CACHE:-$SCRATCH/vlora-cache}
export VLORA_SCRATCH=${VLORA_SCRATCH:-/tmp}
export VLORA_WANDB=offline                          # `wandb sync` from a login node
export VLORA_CONTAINER=apptainer
export VLORA_IMAGE=${VLORA_IMAGE:-$SCRATCH/vlora.sif}
export VLORA_MOUNTS=${SCRATCH:-}

site_environment() {
    export HF_HUB_OFFLINE=1                         # models by folder, or fetched before (python -m train.fetch)
}
