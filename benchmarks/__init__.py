"""Measurements: what the kernels compile to, and how the ops compare with other people's."""
