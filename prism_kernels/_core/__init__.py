"""The ground floor: choosing a path, checking arguments, launching kernels. Knows no op."""
