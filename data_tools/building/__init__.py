"""The build's own machinery: plan, work folder, workers, sorted runs, and the tasks of each stage."""
