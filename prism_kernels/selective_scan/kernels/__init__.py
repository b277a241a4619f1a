"""Triton kernels of the selective scan. Only launch*.py import them, and only for the 'triton' path."""
