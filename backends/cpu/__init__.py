"""The CPU backend: NumPy + Numba. The embedded default, and the numerical oracle of the others."""
