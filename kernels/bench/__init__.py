"""Microbenchmarks of the operations against their peers; `python -m kernels.bench --help`."""
