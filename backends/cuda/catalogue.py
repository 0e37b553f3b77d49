"""Every kernel that a model may ask for: what a bundle has to hold. compile.py compiles them, tests look at all of them.

Models of this menu are made up of sizes that families have; what one of them asks for is asked of the modules that launch.
A model beyond the menu is compiled for when it is loaded, which takes a compiler.
"""

from itertools import product
from typing import get_args

from backends.cuda import attention, elementwise, matrices, mixture, products, sampling
from backends.cuda.attention import CacheItem
from backends.cuda.device import Kernel
from engine.model.spec import Activation, Attention, Mixture, Rope

__all__ = ["all_kernels"]

HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)
EXPERTS = (2, 8, 16, 32, 60, 64, 128, 256)
HIDDEN_SIZES = (4096, 4092, 4090, 4095)          # whole vectors of 8, of 4, of 2, and none
WIDTHS = HIDDEN_SIZES


def all_kernels() -> tuple[Kernel, ...]:
    """In the order of files, each once."""
    of_storages = [*matrices.all_kernels(), *products.all_kernels()]
    found = [*of_storages, *attentions(), *elementwise_of_all(), *mixtures(), *sampling.KERNELS]
    return tuple(sorted(dict.fromkeys(found), key=lambda kernel: (kernel.file, kernel.name)))


def attentions() -> list[Kernel]:
    found: list[Kernel] = []
    for size, interleaved, item in product(HEAD_SIZES, (False, True), get_args(CacheItem)):
        rope = Rope(theta=10_000.0, rotary_size=size, interleaved=interleaved)
        found += attention.attention_kernels(Attention(heads=8, kv_heads=2, head_size=size, scale=1.0, rope=rope), item)
    return found


def elementwise_of_all() -> list[Kernel]:
    return [kernel for size in HIDDEN_SIZES for kernel in elementwise.elementwise_kernels(size, WIDTHS, get_args(Activation))]


def mixtures() -> list[Kernel]:
    found: list[Kernel] = []
    for experts, normalize, hidden_size in product(EXPERTS, (False, True), HIDDEN_SIZES):
        found += mixture.mixture_kernels(Mixture(experts, 2, 1024, normalize), hidden_size)
    return found
