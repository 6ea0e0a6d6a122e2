"""What is looked at before the first step: nodes, links between them, clocks, folders, versions."""
