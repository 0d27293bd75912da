"""Builds bnfast._C where there is a C++ compiler; without one the package works on its PyTorch reference alone."""

import os
import shutil
from glob import glob

from setuptools import setup


def extension():
    """(ext_modules, cmdclass), both empty without a compiler or with BNFAST_NO_EXTENSION=1."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if os.environ.get("BNFAST_NO_EXTENSION") == "1" or not (
        shutil.which(compiler) or shutil.which("g++") or shutil.which("clang++")
    ):
        print(f"bnfast: no C++ compiler ({compiler}) found: building without the compiled kernels")
        return [], {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
    flags += [
        "-g0",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ]
    ext = CppExtension(
        "bnfast._C",
        ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        define_macros=[("BNFAST_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
    )
    return [ext], {"build_ext": BuildExtension.with_options(use_ninja=True)}


ext_modules, cmdclass = extension()
setup(
    packages=["bnfast", "bnfast.triton_kernels"],
    package_dir={"bnfast.triton_kernels": "triton_kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
