"""Looking after runs by their files: status, stop, logs."""
