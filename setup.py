"""Builds bnfast._C where there is a C++ compiler, with the CUDA kernels where there is nvcc too; without a compiler the package
works on its PyTorch reference alone. MAX_JOBS bounds how many files are compiled at once."""

import os
import re
import shutil
import subprocess
from glob import glob

from setuptools import setup

# Compute capabilities that the CUDA kernels are built for by default.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def extension():
    """(ext_modules, cmdclass), both empty without a compiler or with BNFAST_NO_EXTENSION=1."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if os.environ.get("BNFAST_NO_EXTENSION") == "1" or not (
        shutil.which(compiler) or shutil.which("g++") or shutil.which("clang++")
    ):
        print(f"bnfast: no C++ compiler ({compiler}) found: building without the compiled kernels")
        return [], {}
    import torch

    nvcc = find_nvcc(torch)
    if nvcc:
        set_cuda_environment(nvcc)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    flags = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
    flags += [
        "-g0",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ]
    sources = [*sorted(glob("csrc/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))]
    macros = [("BNFAST_TORCH_VERSION", f'"{torch.__version__}"')]
    kind, options = CppExtension, {"extra_compile_args": flags}
    if nvcc:
        sources += sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
        macros.append(("BNFAST_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'))
        # Multiplications and additions are contracted only where the source says so: forward and backward must agree. Division:
        # csrc/cuda/intrinsics.cuh.
        nvcc_flags = [
            "-std=c++20",
            "-O3",
            "-fmad=false",
            "-prec-div=false",
            "-Xcompiler=-fvisibility=hidden",
        ]
        kind = CUDAExtension
        options = {
            "extra_compile_args": {"cxx": flags, "nvcc": nvcc_flags},
            "include_dirs": [os.path.abspath("csrc/cuda")],
        }
    ext = kind(
        "bnfast._C",
        sources,
        define_macros=macros,
        extra_link_args=["-fopenmp"],
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        **options,
    )
    return [ext], {"build_ext": BuildExtension.with_options(use_ninja=True)}


def find_nvcc(torch):
    """The path of nvcc where the CUDA kernels are to be built, else None. BNFAST_FORCE_CUDA=1: an error where they cannot;
    BNFAST_FORCE_CUDA=0: never."""
    forced = os.environ.get("BNFAST_FORCE_CUDA", "")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    missing = []
    if nvcc is None:
        missing.append("nvcc was not found (PATH, CUDA_HOME)")
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is built without CUDA")
    if missing and forced == "1":
        raise RuntimeError(f"BNFAST_FORCE_CUDA=1, but {' and '.join(missing)}")
    if missing or forced == "0":
        why = " and ".join(missing) or "BNFAST_FORCE_CUDA=0"
        print(f"bnfast: {why}: building without the CUDA kernels")
        return None
    return nvcc


def set_cuda_environment(nvcc):
    """CUDA_HOME and TORCH_CUDA_ARCH_LIST for torch's build, where the user has not set them: the toolkit that nvcc says it
    belongs to (nvcc itself may be a script elsewhere), and all architectures that this nvcc knows, with PTX for the newest."""

    def ask(*options):
        done = subprocess.run([nvcc, *options], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        top = re.search(
            r"^#\$ TOP=(.*)$", ask("--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE
        )
        os.environ["CUDA_HOME"] = os.path.realpath(top.group(1).strip('" '))
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = ask("--list-gpu-code").split()
        names = [a for a in ARCHITECTURES if "sm_" + a.replace(".", "") in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"


ext_modules, cmdclass = extension()
setup(
    packages=["bnfast", "bnfast.triton_kernels"],
    package_dir={"bnfast.triton_kernels": "triton_kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
