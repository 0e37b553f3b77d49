"""The CUDA backend: cuda.core and kernels in CUDA C++, no PyTorch. tests/cuda runs it on an emulated device."""
