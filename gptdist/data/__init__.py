"""Training data: what a corpus folder holds, in which order its windows are read, and how they reach the engine."""
