# shellcheck shell=bash
# Site profile: everything about this cluster, in one place. Copy to slurm/site.sh, edit, and load it before submitting:
#     cp slurm/site.example.sh slurm/site.sh; source slurm/site.sh
# The batch scripts load it again on the node. Another file: export VLORA_SITE=FILE.

# --- read by sbatch (they win over the #SBATCH lines, and options on the command line win over them)
#export SBATCH_ACCOUNT=my_account
#export SBATCH_PARTITION=gpu            # a list (a,b) takes whichever can start first; its nodes must be alike
#export SBATCH_QOS=normal
#export SBATCH_CONSTRAINT=a100

# --- where data, converted parts and scratch files are
export VLORA_CACHE=${VLORA_CACHE:-$PWD/.cache}      # shared by all nodes
export VLORA_SCRATCH=${VLORA_SCRATCH:-/tmp}         # local to a node, fast: compiled kernels, temporary files

# --- wandb: offline on nodes without internet; upload from a login node with
#         wandb sync RUN_DIR/wandb/offline-run-*     (the lifetimes of one run have one id and become one run)
export VLORA_WANDB=offline

# --- container: none, apptainer or pyxis
export VLORA_CONTAINER=none
export VLORA_IMAGE=                                 # image.sif, or image.sqsh for pyxis
export VLORA_MOUNTS=                                # e.g. /data,/scratch (repository, cache and scratch are mounted anyway)

# --- a stop must be carried out within this many seconds of its signal, or the run leaves by itself and says so;
#     a little less than the partition's GraceTime and than --signal in the batch scripts
export VLORA_GRACE_SECONDS=540
# --- requeues of one job after which it stays down
export VLORA_MAX_REQUEUES=100

# Called in every batch job before anything else.
site_environment() {
    : # module load cuda/12.8
    # export NCCL_SOCKET_IFNAME=ib0     # network for NCCL's bootstrap, where it picks a wrong one
    # export NCCL_IB_HCA=mlx5           # InfiniBand adapters, where it picks wrong ones
}
