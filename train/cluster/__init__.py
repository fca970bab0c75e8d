"""SLURM: sweeps and jobs."""
