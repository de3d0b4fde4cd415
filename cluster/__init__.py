"""The tasks of a sweep, on this machine or on Slurm."""
