"""What Slurm itself sees: batch scripts, and the template of a run's."""
