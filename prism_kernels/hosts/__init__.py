"""Adapters that make other libraries call our ops; each imports its library when it is used, not before."""
