"""What the network is: its logical parameters, norms, attention and initial weights. Knows no parallelism."""
