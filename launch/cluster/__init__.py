"""Runs as jobs of a Slurm cluster: submitting, the batch script, and what follows an allocation."""
