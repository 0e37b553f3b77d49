"""Numba kernels of the CPU backend, one idea per file. model.py, weights.py and sampler.py call them; they know no model."""
