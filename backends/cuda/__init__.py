"""The CUDA backend: cuda.core and kernels in CUDA C++, no PyTorch. Correct in CI through the emulated device of tests/cuda."""
