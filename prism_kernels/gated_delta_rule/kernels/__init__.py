"""Triton kernels of the gated delta rule. Only op.py imports them, and only for the 'triton' path."""
