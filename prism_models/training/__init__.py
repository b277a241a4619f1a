"""Training with Lightning (extra `train`). Import the submodules; importing this imports nothing else."""
