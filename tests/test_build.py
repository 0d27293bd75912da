"""The compiled extension: no AVX outside the files that are compiled for it, and each capability gives the same bits (but for silu)."""

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest

from bnfast import native

needs_extension = pytest.mark.skipif(native.unavailable is not None, reason=str(native.unavailable))
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")


@needs_extension
@x86_only
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
def test_no_avx_register_outside_the_capability_namespaces():
    """A processor without AVX must be able to import the extension and run the baseline kernels."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", native._C.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbol = ""
    guilty: dict[str, str] = {}
    seen_in_capability = 0
    for line in listing.splitlines():
        head = re.match(r"^[0-9a-f]+ <(.*)>:$", line)
        if head:
            symbol = head.group(1)
        elif re.search(r"%[yz]mm\d|\t\{?v(mov|add|mul|sub|broadcast|fmadd)\w+ ", line):
            if re.search(r"6bnfast(4avx2|6avx512|11avx512_bf16|3amx)", symbol):
                seen_in_capability += 1
            else:
                guilty.setdefault(symbol, line)
    assert seen_in_capability > 1000, (
        "the listing shows no AVX code at all: the test does not see what it should"
    )
    assert not guilty, (
        f"AVX code outside the capability namespaces: {dict(list(guilty.items())[:5])}"
    )


_STEP = """
import hashlib, torch, bnfast
from bnfast import native
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((3, 17, 9, 7), (2, 64, 8, 8), (4, 5, 33, 31)):
        for layout in (torch.contiguous_format, torch.channels_last):
            z = (torch.randn(shape) * 2 + 1).to(dtype).contiguous(memory_format=layout)
            dy, residual = torch.randn_like(z), torch.randn_like(z)
            gamma, beta = torch.randn(shape[1]), torch.randn(shape[1])
            mean, m2, rstd = native.bn_fwd_reduce(z, None, None, None, 0.1, 1e-5)
            for act in ("relu", "leaky_relu", "hardswish"):
                bits = act != "hardswish"
                y, packed = native.bn_fwd_apply(z, mean, rstd, gamma, beta, residual, act, 0.0, bits)
                state = (dy, z, mean, rstd, gamma, beta, None if bits else residual, packed if bits else None)
                sums = native.bn_bwd_reduce(*state, act, 0.0)
                grads = native.bn_bwd_apply(*state, *sums, act, 0.0, True)
                for t in (mean, m2, y, *sums, *grads):
                    digest.update(t.float().contiguous().numpy().tobytes())
print(native.cpu_capability(), digest.hexdigest())
"""


def _run(capability: str) -> tuple[str, str]:
    env = {**os.environ, "BNFAST_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", _STEP], env=env, capture_output=True, text=True)
    if "does not run it" in done.stderr:
        pytest.skip(f"this processor does not run {capability}")
    assert done.returncode == 0, done.stderr
    name, digest = done.stdout.split()
    return name, digest


@needs_extension
@x86_only
@pytest.mark.parametrize("capability", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_capabilities_agree_bit_for_bit(capability):
    assert _run(capability) == (capability, _run("baseline")[1])


@needs_extension
def test_unknown_capability_is_refused():
    env = {**os.environ, "BNFAST_CPU_CAPABILITY": "mmx"}
    code = "from bnfast import native; native.cpu_capability()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "mmx" in done.stderr and "baseline, avx2, avx512, avx512_bf16 and amx" in done.stderr
