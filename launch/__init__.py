"""How a run begins and ends: the `gptdist` command, one rank of a run, and the launchers."""
