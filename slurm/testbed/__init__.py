"""A real Slurm of several nodes on one machine: ``python -m slurm.testbed up|down|status``."""
