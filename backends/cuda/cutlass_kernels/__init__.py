"""Kernels in CuTe DSL, one per file: each compiles to a cubin without a GPU and knows nothing of Rillet. See compile.py."""
