"""Triton's interpreter for tests: on machines without a GPU the kernels run there, on CPU tensors.

Its cast from float32 to bfloat16 cuts bits off where the hardware rounds to nearest even, and its matrix product takes bfloat16
for integers; `install` puts PyTorch's rounding, and products in float32, in their place. tests/test_triton.py verifies the first.
"""

import importlib.util
import os

import numpy as np
import torch


def switched_on() -> bool:
    """Whether the interpreter is on."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def install() -> bool:
    """Switches the interpreter on unless a GPU is there or the environment has decided; returns whether it is on. Must run
    before bnfast.triton_kernels is imported."""
    if importlib.util.find_spec("triton") is None:
        return False
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if not switched_on():
        return False
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    stock = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return stock(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), dst_type.scalar)

    stock_dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        # It holds bfloat16 as integers, and multiplies those.
        wide = [stock(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
        return stock_dot(self, *wide, *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    return True
