# shellcheck shell=bash
# Site profile, third kind: pyxis and enroot, preemptible partition, InfiniBand. Copy to slurm/site.sh and edit; every
# setting is explained in slurm/site.example.sh. The image: containers/Dockerfile, then enroot import.
export SBATCH_PARTITION=preempt,gpu                 # whichever can start first
export VLORA_CACHE=${VLORA_CACHE:-$PWD/.cache}
export VLORA_SCRATCH=${VLORA_SCRATCH:-/raid/scratch}
export VLORA_WANDB=offline
export VLORA_CONTAINER=pyxis
export VLORA_IMAGE=${VLORA_IMAGE:-$PWD/vlora.sqsh}
export VLORA_MOUNTS=
export VLORA_GRACE_SECONDS=100                      # a little less than the partition's GraceTime
export VLORA_MAX_REQUEUES=500

site_environment() {
    export NCCL_SOCKET_IFNAME=ib0
}
