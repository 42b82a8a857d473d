"""A real Slurm of several nodes, with accounting, on one machine: ``python -m slurm.testbed up|down|status``."""
