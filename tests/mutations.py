"""Do the phase tests notice a bug? Plants one at a time into a copy of the tree, rebuilds, and expects red. Mutants of Triton
kernels run in its interpreter, those of CUDA kernels in the emulator.

    python tests/mutations.py [--only PART_OF_A_NAME] [--check] [--workers N]

Each worker has a copy of its own and one thread.

--check only verifies that each text to be replaced occurs exactly once. Exit status 1: a mutant survived, the copy does
not build, or the unmutated copy is not green. The tree itself is never changed.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS, OPERATORS = "csrc/cpu/bn_kernels.h", "csrc/cpu/bn.cpp"
VECTORS, ACTIVATIONS = "csrc/cpu/vec.h", "csrc/activation.h"
WINOGRAD = "csrc/cpu/conv_winograd_kernels.h"
MAX_POOL, MAX_POOL_OPERATORS = "csrc/cpu/max_pool_kernels.h", "csrc/cpu/max_pool.cpp"
WINOGRAD_OPERATORS = "csrc/cpu/conv_winograd.cpp"
WINOGRAD_FORM = "csrc/cpu/conv_winograd.h"
DOT, DOT_GEOMETRY = "csrc/cpu/conv_dot_kernels.h", "csrc/cpu/conv_dot.h"
DOT_OPERATORS, MATRICES = "csrc/cpu/conv_dot.cpp", "csrc/cpu/capability_amx.cpp"
PRODUCTS = "csrc/cpu/gemm_kernels.h"
GROUPED, GROUPED_GEOMETRY = "csrc/cpu/conv_grouped_kernels.h", "csrc/cpu/conv_grouped.h"
GROUPED_OPERATORS = "csrc/cpu/conv_grouped.cpp"
RECORDING, RECORDER = "csrc/recording.cpp", "bnfast/recording.py"
INPUT_ROWS, JOINED = "csrc/cpu/input_rows.h", "csrc/cpu/conv_joined.h"
POINTWISE, POINTWISE_OPERATORS = "csrc/cpu/conv_pointwise_kernels.h", "csrc/cpu/conv_pointwise.cpp"
NATIVE, REFERENCE = "bnfast/native.py", "bnfast/reference.py"
TRITON_FWD, TRITON_BWD = "triton_kernels/bn_fwd.py", "triton_kernels/bn_bwd.py"
TRITON_REDUCE = "triton_kernels/bn_reduce.py"
TRITON_ACTIVATION = "triton_kernels/activation.py"
TRITON_CONV_FWD, TRITON_CONV_BWD = "triton_kernels/conv_fwd.py", "triton_kernels/conv_bwd.py"
TRITON_GRAM = "triton_kernels/conv_gram.py"
TRITON_DEPTHWISE = "triton_kernels/conv_depthwise.py"
CHAIN = "bnfast/ops.py"
CUDA_FWD, CUDA_BWD = "csrc/cuda/bn_fwd.cu", "csrc/cuda/bn_bwd.cu"
CUDA_BLOCKS, CUDA_SLOTS = "csrc/cuda/blocks.cuh", "csrc/cuda/slots.cuh"
COPIED = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "bench",
    "bnfast",
    "csrc",
    "tests",
    "triton_kernels",
)
TESTS = (
    "tests/test_reference.py",
    "tests/test_backends.py",
    "tests/test_squeeze.py",
    "tests/test_winograd.py",
    "tests/test_pointwise.py",
    "tests/test_dot.py",
    "tests/test_joined.py",
    "tests/test_max_pool.py",
    "tests/test_inference.py",
    "tests/test_grouped.py",
    "tests/test_recording.py",
)
TRITON_TESTS = (
    "tests/test_triton_depthwise.py",
    "tests/test_gram.py",
    "tests/test_chain.py",
    "tests/test_triton.py",
    "tests/test_backends.py",
    "--deselect=tests/test_triton.py::test_kernels_compile_for_chips_that_are_not_there",
    "-k=triton",
)
CUDA_TESTS = ("tests/test_cuda.py", "tests/test_backends.py", "-k=cuda")


@dataclass(frozen=True)
class Mutation:
    """Replace the only occurrence of `old` in `file` by `new`."""

    phase: str
    name: str
    file: str
    old: str
    new: str

    @property
    def is_triton(self) -> bool:
        return self.file.startswith("triton_kernels/")

    @property
    def is_cuda(self) -> bool:
        return self.file.startswith("csrc/cuda/")

    @property
    def tests(self) -> tuple[str, ...]:
        """The tests that have to notice it, those first that are about it alone."""
        if self.is_triton:
            return TRITON_TESTS
        if self.file == CHAIN:
            return ("tests/test_chain.py", "-k=reference")
        if self.is_cuda:
            return CUDA_TESTS
        text = f"{self.file} {self.name}"
        return tuple(sorted(TESTS, key=lambda path: path[len("tests/test_") : -3] not in text))


MUTATIONS = [
    Mutation(
        "se_bwd_sums",
        "squeeze: sums of act' not centred",
        KERNELS,
        "sum[4] = sum[4] + slope * centred;",
        "sum[4] = sum[4] + slope;",
    ),
    Mutation(
        "se_bwd_sums",
        "squeeze: the last pixels of a piece forgotten",
        KERNELS,
        "const int64_t pixels = std::min<int64_t>(kPixels, span.end - p);",
        "const int64_t pixels = span.end - p < kPixels ? 0 : kPixels;",
    ),
    Mutation(
        "conv_fwd_reduce",
        "squeeze: the first image's gate for all",
        KERNELS,
        "const int64_t n = p / plane * span.channels;",
        "const int64_t n = 0;",
    ),
    Mutation(
        "conv_dgrad",
        "squeeze: what the gate's own gradient adds forgotten",
        OPERATORS,
        'if (shift) shift_ = taken(*shift, "shift", of);',
        "",
    ),
    Mutation(
        "se_bwd_sums",
        "squeeze: dbeta without what the gate's own gradient adds",
        REFERENCE,
        ".addcmul(sums[:, 3], shift)",
        "",
    ),
    Mutation(
        "conv_dgrad",
        "squeeze: joined with any convolution in front of it",
        NATIVE,
        "groups_below > 1 and _runs_as_pointwise",
        "_runs_as_pointwise",
    ),
    # chains run again from a recording
    Mutation(
        "chain",
        "recording: a changed weight",
        RECORDING,
        " &&\n           weight_checksum(t) == checksum;",
        ";",
    ),
    Mutation(
        "chain",
        "recording: any residual for the input",
        RECORDING,
        "if (!given[one]->is_same(*given[other])) return py::none();",
        "",
    ),
    Mutation(
        "chain",
        "recording: values are kept",
        RECORDING,
        "argument->is_last = !is_needed[argument->slot];",
        "argument->is_last = false;",
    ),
    Mutation(
        "chain",
        "recording: what came from elsewhere is a constant",
        RECORDER,
        "if slot == -2 or (",
        "if (",
    ),
    # bn_fwd_reduce, rows (channels_last)
    Mutation(
        "bn_fwd_reduce",
        "rows: tiles merged without the distance of their means",
        KERNELS,
        "(square[j] - d * d * one_over) + step * step * m2_weight",
        "(square[j] - d * d * one_over)",
    ),
    Mutation(
        "bn_fwd_reduce",
        "rows: a tile's weight ignores what came before",
        KERNELS,
        "m2_weight = done * (rows / n)",
        "m2_weight = rows * (rows / n)",
    ),
    Mutation(
        "bn_fwd_reduce",
        "rows: squares around the mean of the first channels",
        KERNELS,
        "const Block<A> c = load_block(centre + j);",
        "const Block<A> c = load_block(centre);",
    ),
    Mutation(
        "bn_fwd_reduce",
        "rows: squares around 0",
        KERNELS,
        "Block<A> d = load_block(x) - c;",
        "Block<A> d = load_block(x);",
    ),
    Mutation(
        "bn_fwd_reduce",
        "rows: last row of a tile forgotten",
        KERNELS,
        "for (; e < span.end; e += span.length) add(e, Flag<false>{});",
        "for (; e + span.length < span.end; e += span.length) add(e, Flag<false>{});",
    ),
    Mutation(
        "bn_fwd_reduce",
        "rows: places past the partial row counted",
        OPERATORS,
        "return j < tail ? 1 : 0;",
        "return 1;",
    ),
    Mutation(
        "bn_fwd_reduce",
        "rows: M2 of the partial row left unwritten",
        OPERATORS,
        "partials.second[last].zero_();",
        "",
    ),
    Mutation(
        "bn_fwd_reduce",
        "rows: partial row read without the tensor's offset",
        OPERATORS,
        "begin = z.storage_offset() + units.span(last).begin",
        "begin = units.span(last).begin",
    ),
    # bn_fwd_reduce, planes (NCHW)
    Mutation(
        "bn_fwd_reduce",
        "planes: lanes past the end add the squared mean",
        KERNELS,
        "d = select(first_lanes<A>(lanes.lanes), d, Block<A>(0));",
        "",
    ),
    Mutation(
        "bn_fwd_reduce",
        "planes: the last partial block is skipped",
        KERNELS,
        "if (j < n) sums[1] = sums[1] + f(e, j, First{n - j}, word);",
        "",
    ),
    Mutation(
        "bn_fwd_reduce",
        "planes: one of the four sums dropped",
        KERNELS,
        "lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]))",
        "lane_sum((sums[0] + sums[1]) + sums[2])",
    ),
    Mutation(
        "bn_fwd_reduce",
        "planes: a piece weighs as much as its plane",
        OPERATORS,
        "return (s.n_end - s.n_begin) * (s.s_end - s.s_begin);",
        "return (s.n_end - s.n_begin) * plane;",
    ),
    # bn_fwd_reduce, both
    Mutation(
        "bn_fwd_reduce",
        "units merged without the distance of their means",
        OPERATORS,
        "m2[c] += part_m2 + n * d * d;",
        "m2[c] += part_m2;",
    ),
    Mutation(
        "bn_fwd_reduce",
        "running variance biased",
        OPERATORS,
        "value /= std::max(count - 1, 1.0);",
        "value /= count;",
    ),
    Mutation(
        "bn_fwd_reduce",
        "momentum None counted before the increment",
        OPERATORS,
        "1.0 / num_batches_tracked->item<int64_t>()",
        "1.0 / (num_batches_tracked->item<int64_t>() - 1)",
    ),
    Mutation(
        "bn_fwd_reduce",
        "momentum the wrong way round",
        OPERATORS,
        "(1 - factor) * values[c] + factor * batch[c]",
        "factor * values[c] + (1 - factor) * batch[c]",
    ),
    Mutation(
        "bn_fwd_reduce",
        "infinite rstd where variance and eps are 0",
        OPERATORS,
        "shifted == 0 ? 0.0 : 1.0 / std::sqrt(shifted)",
        "1.0 / std::sqrt(shifted)",
    ),
    # bn_fwd_apply
    Mutation(
        "bn_fwd_apply",
        "rows: bits of all rows of a unit in one place",
        KERNELS,
        "body(channel, e, j, lanes, e / kBlock); });",
        "body(channel, e, j, lanes, s.begin / kBlock); });",
    ),
    Mutation(
        "bn_fwd_apply",
        "rows: parameters of small planes interleaved wrongly",
        OPERATORS,
        "for (int64_t i = 0; i < (l.rows ? l.inner : 1); ++i) to[j++] = v;",
        "for (int64_t i = 0; i < (l.rows ? l.inner : 1); ++i) to[(i * l.channels + c) % pixel] = v, ++j;",
    ),
    Mutation(
        "bn_fwd_apply",
        "planes: bits of all pieces of a plane in one place",
        KERNELS,
        "p * words + s.s_begin / kBlock);",
        "p * words);",
    ),
    Mutation(
        "bn_fwd_apply",
        "planes: parameters of the channel before",
        KERNELS,
        "s.s_end - s.s_begin, c, p * words",
        "s.s_end - s.s_begin, c > s.c_begin ? c - 1 : c, p * words",
    ),
    Mutation(
        "bn_fwd_apply",
        "beta - mean * scale folded, which cancels",
        KERNELS,
        "return (z - channel.mean.at(j, lanes)) * channel.scale.at(j, lanes) + channel.beta.at(j, lanes);",
        "return z * channel.scale.at(j, lanes) + (channel.beta.at(j, lanes) - channel.mean.at(j, lanes) * channel.scale.at(j, lanes));",
    ),
    Mutation(
        "bn_fwd_apply",
        "bits from the pre-activation before rounding",
        KERNELS,
        "to_bits<A>(act.passes(rounded_to<T>(pre)))",
        "to_bits<A>(act.passes(pre))",
    ),
    Mutation(
        "bn_fwd_apply",
        "relu swallows a NaN",
        ACTIVATIONS,
        "return select(x < V(0), V(0), x); }",
        "return select(x > V(0), x, V(0)); }",
    ),
    Mutation(
        "bn_fwd_apply",
        "a coarse exponential",
        VECTORS,
        "e = fma(e, r, zero + 0.0416680053f);",
        "e = fma(e, r, zero + 0.0417680053f);",
    ),
    Mutation(
        "bn_fwd_apply",
        "bfloat16 truncated instead of rounded",
        VECTORS,
        "(x + 0x7fffu + ((x >> 16) & 1u)) >> 16",
        "x >> 16",
    ),
    # bn_bwd_reduce, rows
    Mutation(
        "bn_bwd_reduce",
        "rows: z not centred",
        KERNELS,
        "db_z_sum = db_z_sum + db * (zb - held.mean.at(j, lanes));",
        "db_z_sum = db_z_sum + db * zb;",
    ),
    Mutation(
        "bn_bwd_reduce",
        "rows: one row of four forgotten",
        KERNELS,
        "add(held, e + i * length, j, Whole{}, db_sum, db_z_sum);",
        "if (i < 3) add(held, e + i * length, j, Whole{}, db_sum, db_z_sum);",
    ),
    Mutation(
        "bn_bwd_reduce",
        "rows: the last rows add to one sum only",
        KERNELS,
        "store(second + j, db_z_sum, lanes);",
        "",
    ),
    # bn_bwd_reduce, planes
    Mutation(
        "bn_bwd_reduce",
        "planes: z not centred",
        KERNELS,
        "sum = sum + db * (zb - channel.mean.at(j, lanes));",
        "sum = sum + db * zb;",
    ),
    Mutation(
        "bn_bwd_reduce",
        "planes: every second block forgotten",
        KERNELS,
        "lane_sum(db_z_sum[0] + db_z_sum[1])",
        "lane_sum(db_z_sum[0])",
    ),
    # bn_bwd_reduce, both
    Mutation(
        "bn_bwd_reduce",
        "only the last unit counts",
        OPERATORS,
        "db_z[c] += part_db_z;",
        "db_z[c] = part_db_z;",
    ),
    Mutation(
        "bn_bwd_reduce",
        "dgamma not scaled by rstd",
        OPERATORS,
        "dgamma_ptr[c] = db_z[c] * static_cast<double>(rstd.values[c]);",
        "dgamma_ptr[c] = db_z[c];",
    ),
    Mutation(
        "bn_bwd_reduce",
        "mask from the pre-activation before rounding",
        KERNELS,
        "return act.masked(act.passes(rounded_to<T>(pre)), grad);",
        "return act.masked(act.passes(pre), grad);",
    ),
    Mutation(
        "bn_bwd_reduce",
        "relu lets the gradient of 0 pass",
        ACTIVATIONS,
        "passes(V x) const { return !(x <= V(0)); }",
        "passes(V x) const { return !(x < V(0)); }",
    ),
    Mutation(
        "bn_bwd_reduce",
        "relu stops the gradient of a NaN",
        ACTIVATIONS,
        "passes(V x) const { return !(x <= V(0)); }",
        "passes(V x) const { return x > V(0); }",
    ),
    Mutation(
        "bn_bwd_reduce",
        "relu6 lets the gradient of 6 pass",
        ACTIVATIONS,
        "(x <= V(0)) | (x >= V(6))",
        "(x <= V(0)) | (x > V(6))",
    ),
    Mutation(
        "bn_bwd_reduce",
        "slope of silu",
        ACTIVATIONS,
        "s * (V(1) + x * (V(1) - s))",
        "s * (V(1) + x * (V(1) + s))",
    ),
    Mutation(
        "bn_bwd_reduce",
        "slope of hardswish at 3",
        ACTIVATIONS,
        "select(x < V(3), middle, dy)",
        "select(x <= V(3), middle, dy)",
    ),
    # bn_bwd_apply
    Mutation(
        "bn_bwd_apply",
        "without the mean of db",
        KERNELS,
        "(db - channel.shift_db.at(j, lanes)) -",
        "db -",
    ),
    Mutation(
        "bn_bwd_apply",
        "z not centred",
        KERNELS,
        "(zb - channel.mean.at(j, lanes)) * channel.shift_z.at(j, lanes);",
        "zb * channel.shift_z.at(j, lanes);",
    ),
    Mutation(
        "bn_bwd_apply",
        "rows: batch statistics treated as constants",
        KERNELS,
        "if constexpr (batch_statistics) {",
        "if constexpr (batch_statistics && !kRows<Span>) {",
    ),
    Mutation(
        "bn_bwd_apply",
        "gradient of the residual scaled",
        KERNELS,
        "if constexpr (has_residual) write(dr + e + j, db, lanes, streams);",
        "if constexpr (has_residual) store(dr + e + j, db * channel.scale.at(j, lanes), lanes);",
    ),
    Mutation(
        "bn_bwd_apply",
        "dgamma's term without rstd",
        OPERATORS,
        "return rstd[c] * dgamma[c] / count;",
        "return dgamma[c] / count;",
    ),
    Mutation(
        "bn_bwd_apply",
        "rows: the last elements of the last unit not written",
        OPERATORS,
        "std::min(l.numel(), (u + 1) * per_unit)});",
        "std::min(l.numel() / l.length * l.length, (u + 1) * per_unit)});",
    ),
    Mutation(
        "bn_bwd_apply",
        "planes: the last elements of a plane not written",
        OPERATORS,
        "std::min(l.plane, s + per_piece)});",
        "std::min(std::max<int64_t>(1, l.plane - 1), s + per_piece)});",
    ),
    # two phases in one, planes
    Mutation(
        "bn_fwd_reduce_apply",
        "the last image of a block not written",
        OPERATORS,
        "for (int64_t n = l.batch; n-- > 0;) kernels.fwd_apply_planes(",
        "for (int64_t n = l.batch - 1; n-- > 0;) kernels.fwd_apply_planes(",
    ),
    Mutation(
        "bn_fwd_reduce_apply",
        "gamma without rstd",
        OPERATORS,
        "scale[c] *= rstd[c];",
        "",
    ),
    Mutation(
        "bn_bwd_reduce_apply",
        "the terms of the batch statistics swapped",
        OPERATORS,
        "shift_db[c] = shifts.db(c);",
        "shift_db[c] = shifts.z(c);",
    ),
    # the convolution
    Mutation(
        "se_bwd_reduce",
        "every block reads the first channels",
        KERNELS,
        "const int64_t at = pixel * count + j;",
        "const int64_t at = pixel * count;",
    ),
    Mutation(
        "se_bwd_reduce",
        "last pixel of a piece forgotten",
        OPERATORS,
        "const int64_t last = std::min(l.plane, first + per_piece);",
        "const int64_t last = std::min(l.plane, first + per_piece - 1);",
    ),
    Mutation(
        "conv_dgrad",
        "strided grouped: taps that reach between two outputs are used",
        GROUPED_GEOMETRY,
        "reach % stride == 0 && ",
        "",
    ),
    Mutation(
        "conv_fwd_reduce",
        "grouped: outputs of a run read what the first one reads",
        GROUPED,
        "met.x[i] + offset + c;",
        "met.x[i] + c;",
    ),
    Mutation(
        "conv_fwd_reduce",
        "grouped: bias forgotten",
        GROUPED,
        "bias && o < kCount ? load(bias + c, lanes) : B(0)",
        "B(0)",
    ),
    Mutation(
        "conv_fwd_reduce",
        "grouped: a group takes another's channels",
        GROUPED,
        "kWidth <= kLanes ? l - l % kWidth + i",
        "kWidth <= kLanes ? i",
    ),
    Mutation(
        "conv_fwd_reduce",
        "grouped: a bias for each of an output's sums",
        GROUPED,
        "bias && o < kCount ?",
        "bias ?",
    ),
    Mutation(
        "conv_dgrad",
        "grouped: channels of a group not exchanged",
        "bnfast/grouped.py",
        "weight.unflatten(0, (-1, width)).transpose(1, 2)",
        "weight.unflatten(0, (-1, width))",
    ),
    Mutation(
        "conv_dgrad",
        "grouped: the first row of the gradient not made",
        GROUPED_GEOMETRY,
        "(o + padding - reached + stride - 1) / stride",
        "(o + padding - reached + stride - 1) / stride + 1",
    ),
    Mutation(
        "conv_fwd_reduce",
        "grouped: one row too few kept of those that are made",
        GROUPED_GEOMETRY,
        "(kernel - 1) * dilation / (is_gradient ? stride : 1) + 1",
        "(kernel - 1) * dilation / (is_gradient ? stride : 1)",
    ),
    Mutation(
        "bn_fwd_apply",
        "planes: a streamed Block half written",
        VECTORS,
        "for (size_t i = 0; i < sizeof(lane); i += kBytes) {",
        "for (size_t i = 0; i < sizeof(lane) / 2; i += kBytes) {",
    ),
    Mutation(
        "bn_bwd_apply",
        "planes: streamed to where no Block begins",
        OPERATORS,
        "l.plane % kBlockLanes == 0 &&",
        "",
    ),
    Mutation(
        "conv_dgrad",
        "rows of the input that no window reached",
        REFERENCE,
        "size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)",
        "size - ((out - 1) * s - 2 * p + (k - 1) + 1)",
    ),
    Mutation(
        "bn_fwd_apply",
        "parameters of the first Block of a row held for all",
        KERNELS,
        "(body(held[I], e,",
        "(body(held[0], e,",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd: a sign in the transform of the input",
        WINOGRAD,
        "v[4] = fma(odd2, -2, even2);",
        "v[4] = fma(odd2, 2, even2);",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd: a factor in the transform of the output",
        WINOGRAD,
        "y[3] = fma(difference2, 8, difference1) + m[5];",
        "y[3] = fma(difference2, 4, difference1) + m[5];",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, wide tiles: a factor in the transform of the input",
        WINOGRAD,
        "v[6] = fma(odd_half, -0.5f, even_half);",
        "v[6] = fma(odd_half, -2, even_half);",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, wide tiles: a factor in the transform of the output",
        WINOGRAD,
        "y[4] = fma(sum_half, 0.0625f,",
        "y[4] = fma(sum_half, 0.25f,",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, wide tiles: weights of short tiles taken for those of tiles of 4 x 4",
        WINOGRAD,
        "v[4] = few[4] * 3.75f;",
        "v[4] = few[4];",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, wide tiles: five outputs through the points of four",
        WINOGRAD_FORM,
        "outputs + taps > 7 ? out : outputs",
        "outputs + taps > 8 ? out : outputs",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, stems: the last output of a tile without the point infinity",
        WINOGRAD,
        "y[4] = more[4] + m[7];",
        "y[4] = more[4];",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, stems: the last output of a short tile without the point infinity",
        WINOGRAD,
        "i + 1 == outputs ? more[i] + m[7] : more[i]",
        "more[i]",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, stems: the place right of an odd image is the next row's first",
        WINOGRAD_OPERATORS,
        "out[i] = i < there ? line[2 * column * channels + i] : 0;",
        "out[i] = line[2 * column * channels + i];",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, stems: odd padding begins a block late",
        WINOGRAD_OPERATORS,
        "int64_t floor_half(int64_t value) { return value >> 1; }",
        "int64_t floor_half(int64_t value) { return value / 2; }",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd: the sum of the last channels for that of all",
        WINOGRAD,
        "c > 0 ? load_block(to) + sum : sum",
        "sum",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd: the last channels of the input forgotten",
        WINOGRAD,
        "if (c < d.channels) transform(c, First{d.channels - c}, to + c);",
        "",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd: tiles at the right edge read the next row",
        WINOGRAD,
        "d.channels}, -w, d.width - w};",
        "d.channels}, -w, d.width};",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd: bias forgotten",
        WINOGRAD,
        "d.bias ? load_block(d.bias + k) : FloatBlock(0)",
        "FloatBlock(0)",
    ),
    Mutation(
        "conv_fwd_reduce",
        "dot: the bias of the first block for all",
        DOT,
        "load_block(d.bias + (block + b) * kBlock)",
        "load_block(d.bias + b * kBlock)",
    ),
    Mutation(
        "conv_fwd_reduce",
        "dot: a partial block of channels written whole",
        DOT,
        "store(y, sum + bias[b], lanes);",
        "store_block(y, sum + bias[b]);",
    ),
    Mutation(
        "conv_fwd_reduce",
        "dot: no zeros behind a row",
        DOT_OPERATORS,
        "std::memset(to + across_.in * channels_, 0, right *",
        "std::memset(to + across_.in * channels_, 0, 0 *",
    ),
    Mutation(
        "conv_fwd_reduce",
        "dot: no zeros above and below an image",
        DOT_OPERATORS,
        "std::memset(line, 0, row_elements() * sizeof(bf16));",
        "",
    ),
    Mutation(
        "conv_fwd_reduce",
        "dot: rows made from the first to the last",
        DOT_OPERATORS,
        "for (int64_t i = rows_of(count) - 1; i >= 0; --i) {",
        "for (int64_t i = 0; i < rows_of(count); ++i) {",
    ),
    Mutation(
        "conv_fwd_reduce",
        "dot: strided, all rows taken for those of one remainder",
        DOT_OPERATORS,
        "const int64_t line = row % down_.in_step() * class_elements_",
        "const int64_t line = 0 * class_elements_",
    ),
    Mutation(
        "conv_fwd_reduce",
        "dot: the second sixteen positions are the first",
        MATRICES,
        "_tile_loadd(5, from + c + second, row_bytes);",
        "_tile_loadd(5, from + c, row_bytes);",
    ),
    Mutation(
        "conv_dgrad",
        "dot: taps that reach between two outputs are used",
        DOT_GEOMETRY,
        "return !is_gradient || (phase + padding - tap * dilation) % stride == 0;",
        "return true;",
    ),
    Mutation(
        "conv_dgrad",
        "dot: outputs that the image does not have are kept",
        DOT,
        "std::clamp<int64_t>(span_.columns - column_, 0, count)",
        "std::clamp<int64_t>(span_.row_step - column_, 0, count)",
    ),
    Mutation(
        "conv_dgrad",
        "dot: weights not transposed",
        NATIVE,
        "dot.packed_weight(w.transpose(0, 1))",
        "dot.packed_weight(w.reshape(w.shape[1], w.shape[0], *w.shape[2:]))",
    ),
    Mutation(
        "conv_fwd_reduce",
        "pointwise: rows behind the last tile forgotten",
        POINTWISE,
        "for (; r < end; ++r) tile(std::integral_constant<int, 1>{}, r);",
        "",
    ),
    Mutation(
        "conv_fwd_reduce",
        "pointwise: the last rows again, a row too early",
        POINTWISE,
        "tile(std::integral_constant<int, kNarrowRows>{}, end - kNarrowRows);",
        "tile(std::integral_constant<int, kNarrowRows>{}, end - kNarrowRows - 1);",
    ),
    Mutation(
        "conv_fwd_reduce",
        "pointwise: a partial block of channels written whole",
        POINTWISE,
        "if constexpr (b + 1 == kBlocks) store(to, sum, lanes);",
        "if constexpr (b + 1 == kBlocks) store_block(to, sum);",
    ),
    Mutation(
        "conv_fwd_reduce",
        "pointwise: the bias of the first block for all",
        POINTWISE,
        "load_block(d.bias + (block + b) * kBlock)",
        "load_block(d.bias + b * kBlock)",
    ),
    Mutation(
        "conv_fwd_reduce",
        "pointwise: the partial row is reduced before it is written",
        OPERATORS,
        "if (produce) (*produce)(last, units.span(last).begin / l.channels, l.count(), nothing, nullptr, nullptr);",
        "",
    ),
    Mutation(
        "conv_dgrad",
        "pointwise: dz of the first pixels for all",
        POINTWISE_OPERATORS,
        "source_.write_from(from, to, channels_, to_);",
        "source_.write_from(0, to - from, channels_, to_);",
    ),
    Mutation(
        "conv_dgrad",
        "pointwise: weights not transposed",
        NATIVE,
        "pointwise.packed_weight(w.transpose(0, 1))",
        "pointwise.packed_weight(w.reshape(w.shape[1], w.shape[0], 1, 1))",
    ),
    Mutation(
        "conv_dgrad",
        "winograd: kernel not rotated",
        NATIVE,
        "turned = w.to(dz.dtype).flip(2, 3).transpose(0, 1)",
        "turned = w.to(dz.dtype).transpose(0, 1)",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, stride 2: a factor in the transform of the input",
        WINOGRAD,
        "v[2] = fma(d[1], 2, fma(d[2], -3, d[3]));\n    v[3] = outer;",
        "v[2] = fma(d[1], 2, fma(d[2], -1, d[3]));\n    v[3] = outer;",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, stride 2: the middle tap forgotten",
        WINOGRAD,
        "BNFAST_INLINE_LAMBDA { y[i] = y[i] + m[5 + i]; }",
        "BNFAST_INLINE_LAMBDA {}",
    ),
    Mutation(
        "conv_dgrad",
        "winograd, stride 2: outputs of the outer taps and of the middle one exchanged",
        WINOGRAD,
        "y[2 * i] = m[5 + i];\n      y[2 * i + 1] = outer[i];",
        "y[2 * i + 1] = m[5 + i];\n      y[2 * i] = outer[i];",
    ),
    Mutation(
        "conv_dgrad",
        "winograd, stride 2: every padding taken for an odd one",
        WINOGRAD_OPERATORS,
        "top = padding[0] % 2 - 1,",
        "top = 0,",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, stride 2: points of one matrix spread over unused rows",
        WINOGRAD,
        "place_[i * kPoints + j] = begin + rows * columns;",
        "place_[i * kPoints + j] = begin + ((i - a) * across + j - b) * d.tiles * columns;",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd: tiles short down take rows of those short across",
        WINOGRAD,
        "!short_across_has_[j] ? count_[kShortAcross] : 0",
        "!short_across_has_[j] ? count_[kShortBoth] : 0",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, moments: 0 for the centre",
        WINOGRAD,
        "sums.sum * (1.0f / static_cast<float>(outputs))",
        "sums.sum * 0.0f",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, moments: the first tile forgotten",
        WINOGRAD,
        "moments && at.tile == begin * d.tile_columns ? 0 : 1; pass < 2;",
        "moments && at.tile == begin * d.tile_columns ? 0 : 1; pass < (at.tile == begin * d.tile_columns ? 1 : 2);",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, moments: outputs of a short tile that do not exist",
        WINOGRAD,
        "sums.add(t, first_across, across);",
        "sums.add(t, first_across);",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd, moments: threads that share channels keep those of one unit",
        WINOGRAD_OPERATORS,
        "const int64_t moments = unit * d_.out_channels;",
        "const int64_t moments = 0;",
    ),
    Mutation(
        "conv_fwd_reduce",
        "products of 16 channels: the last 8 rows taken for 4",
        PRODUCTS,
        "if (rows >= 8) take(",
        "if (rows > 8) take(",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd: a factor in the transform of a tile with three outputs",
        WINOGRAD,
        "v[5] = fma(odd, -2, d[4] - d[2]);",
        "v[5] = fma(odd, -1, d[4] - d[2]);",
    ),
    Mutation(
        "conv_fwd_reduce",
        "winograd: the last tile of a row taken for a whole one",
        WINOGRAD_OPERATORS,
        "d_.last_across = static_cast<int>(d_.out_width - d_.out_left - (d_.tile_columns - 1) * d_.form.out);",
        "d_.last_across = d_.form.out;",
    ),
    Mutation(
        "conv_dgrad",
        "winograd, stride 2: the last output of a short tile forgotten",
        WINOGRAD_FORM,
        "out == 8 ? (outputs + 1) / 2 : outputs",
        "out == 8 ? outputs / 2 : outputs",
    ),
    Mutation(
        "conv_fwd_reduce",
        "joined: rows that are kept and not read by the convolution forgotten",
        INPUT_ROWS,
        "if (so_far_.image >= 0 && first < last) source_->keep(",
        "if (so_far_.image > height_ && first < last) source_->keep(",
    ),
    Mutation(
        "conv_fwd_reduce",
        "joined: a row in front of the kept ones lies over them in the ring",
        INPUT_ROWS,
        "return is_own(row) ? kept_ + row * width_ * channels_ : place(r);",
        "return kept_ ? kept_ + row * width_ * channels_ : place(r);",
    ),
    Mutation(
        "conv_fwd_reduce",
        "joined: kept rows without their bits",
        OPERATORS,
        "tensors.bits = want_bits ? static_cast<uint16_t*>(bits.mutable_data_ptr()) : nullptr;",
        "tensors.bits = nullptr;",
    ),
    Mutation(
        "conv_fwd_reduce",
        "joined: rows that are made are taken for those of the image before",
        INPUT_ROWS,
        "so_far_ = {image, 0};",
        "so_far_.image = image;",
    ),
    Mutation(
        "conv_fwd_reduce",
        "joined: one place too few for the rows that are made",
        INPUT_ROWS,
        "made_ + r % reach_ * width_",
        "made_ + r % (reach_ - 1) * width_",
    ),
    Mutation(
        "conv_fwd_reduce",
        "joined: pixels made from the group's beginning go to the piece's",
        "csrc/cpu/pixels.h",
        "static_cast<char*>(to) - before * channels * element_bytes());",
        "to);",
    ),
    Mutation(
        "conv_fwd_reduce",
        "joined: units reduced before they are written",
        JOINED,
        "if (at_once) return finds_moments;",
        "if (at_once || unit-- == 0) return finds_moments;",
    ),
    Mutation(
        "conv_dgrad",
        "joined: a piece of a unit is not taken",
        GROUPED_OPERATORS,
        "take(rows.begin * width, rows.end * width, upcoming);",
        "if (rows.end < row(u + 1) || begin == row(u)) take(rows.begin * width, rows.end * width, upcoming);",
    ),
    Mutation(
        "conv_dgrad",
        "joined: what else flows in is forgotten",
        KERNELS,
        "if constexpr (has_add) given = rounded_to<T>(given + load(more + e + j, lanes));",
        "",
    ),
    Mutation(
        "conv_dgrad",
        "joined: db is not written",
        KERNELS,
        "store(dy + e + j, db = rounded_to<T>(db), lanes);",
        "store(dy + e + j, given, lanes);",
    ),
    Mutation(
        "conv_dgrad",
        "joined: dy is left of a smooth activation",
        KERNELS,
        " || t.act == Act::kHardswish;",
        ";",
    ),
    Mutation(
        "conv_dgrad",
        "joined: sums begin with what memory held",
        OPERATORS,
        "if (first == begin(unit)) std::fill",
        "if (first < begin(unit)) std::fill",
    ),
    Mutation(
        "conv_dgrad",
        "joined: the unit beside is centred by the unit's mean",
        KERNELS,
        "load(mean_beside + j, lanes)",
        "channel.mean.at(j, lanes)",
    ),
    Mutation(
        "max_pool",
        "joined: rows made from the window's beginning, border or not",
        MAX_POOL_OPERATORS,
        "std::max<int64_t>(0, begin * d.stride_height - d.padding_height)",
        "std::max<int64_t>(0, begin * d.stride_height)",
    ),
    Mutation(
        "max_pool",
        "joined: picked one row of the window too low",
        MAX_POOL,
        "place == Block<A>((i - h) * d.kernel_width + j - w)",
        "place == Block<A>((i - h + 1) * d.kernel_width + j - w)",
    ),
    Mutation(
        "max_pool",
        "joined: what is picked lies at the beginning",
        MAX_POOL_OPERATORS,
        "d.p = own->first() - begin * pixel_bytes;",
        "d.p = own->first();",
    ),
    Mutation(
        "conv_fwd_apply",
        "the last unit stays z",
        JOINED,
        "Upcoming&) { behind.take(first, last); }",
        "Upcoming&) { if (u + 1 < end) behind.take(first, last); }",
    ),
    Mutation(
        "conv_fwd_apply",
        "1x1: pixels of an earlier chunk normalised again",
        POINTWISE_OPERATORS,
        "behind.take(from, to);\n    }\n  });\n  return product.y;",
        "behind.take(first * units.each, to);\n    }\n  });\n  return product.y;",
    ),
    Mutation(
        "conv_fwd_reduce",
        "Winograd: threads that share the weights leave the last blocks",
        WINOGRAD_OPERATORS,
        "piece(unit, block, std::min(blocks_, block + blocks_per_piece_), ",
        "piece(unit, block, std::min(blocks_ - is_shared_, block + blocks_per_piece_), ",
    ),
    Mutation(
        "conv_fwd_reduce",
        "Winograd: rows of a tile that are outside are those of the neighbour",
        WINOGRAD,
        "from.row[i] = lines[i] ? lines[i] + w * d.channels : zeros;",
        "from.row[i] = lines[i] ? lines[i] + w * d.channels : lines[3] + w * d.channels;",
    ),
    Mutation(
        "max_pool",
        "of equal values the last",
        MAX_POOL,
        "(value > best) | !(value == value)",
        "(value >= best) | !(value == value)",
    ),
    Mutation(
        "max_pool",
        "a NaN loses",
        MAX_POOL,
        "(value > best) | !(value == value)",
        "value > best",
    ),
    Mutation(
        "max_pool",
        "backward: the last window forgotten",
        MAX_POOL,
        "std::min(d.out_width, w / d.stride_width + 1)",
        "std::min(d.out_width, w / d.stride_width)",
    ),
    Mutation(
        "conv_dgrad",
        "kernel not rotated",
        NATIVE,
        "w.to(dz.dtype).flip(list(range(2, w.dim())))",
        "w.to(dz.dtype)",
    ),
    Mutation(
        "conv_dgrad",
        "channels of the groups exchanged",
        NATIVE,
        "return w.reshape(groups * in_per_group, out_per_group, *w.shape[3:]).contiguous(",
        "return w.flip(0).reshape(groups * in_per_group, out_per_group, *w.shape[3:]).contiguous(",
    ),
    Mutation(
        "conv_dgrad",
        "pixels that a strided 1x1 kernel skips left unwritten",
        NATIVE,
        "dx = torch.zeros(",
        "dx = torch.empty(",
    ),
    Mutation(
        "conv_fwd_reduce",
        "bias forgotten",
        REFERENCE,
        "x, weight, bias, stride, padding, dilation, False",
        "x, weight, None, stride, padding, dilation, False",
    ),
    # Triton
    Mutation(
        "bn_fwd_reduce",
        "triton: offsets of 32 bits where they need more",
        TRITON_FWD,
        "tl.full([], size, tl.int64 if WIDE else tl.int32) * index",
        "tl.full([], size, tl.int32) * index",
    ),
    Mutation(
        "bn_fwd_reduce",
        "triton: tiles merged without the distance of their means",
        TRITON_FWD,
        "m2 + square + step * step * (count * weight)",
        "m2 + square",
    ),
    Mutation(
        "bn_fwd_reduce",
        "triton: squares around 0",
        TRITON_FWD,
        "d = tl.where(mask, z - spread(centre, CHANNEL_IS_COLUMN), 0)",
        "d = tl.where(mask, z, 0)",
    ),
    Mutation(
        "bn_fwd_reduce",
        "triton: splits merged without the distance of their means",
        TRITON_FWD,
        "inside, 0) + n * d * d, 0)",
        "inside, 0), 0)",
    ),
    Mutation(
        "bn_fwd_reduce",
        "triton: a split's mean as one number",
        TRITON_FWD,
        "low = (origin - (high - of_mean)) + (mean - of_mean)",
        "low = mean * 0",
    ),
    Mutation(
        "bn_fwd_reduce",
        "triton: squares around a rounded mean on chip",
        TRITON_REDUCE,
        "over_slab(d * d, CHANNEL_IS_COLUMN) - rest * rest / values",
        "over_slab(z * z, CHANNEL_IS_COLUMN) - values * centre * centre",
    ),
    Mutation(
        "bn_fwd_reduce",
        "triton: batches counted once per block of channels on chip",
        TRITON_REDUCE,
        "counted_ptr is not None and tl.program_id(0) == 0",
        "counted_ptr is not None",
    ),
    Mutation(
        "bn_bwd_reduce",
        "triton: a channel on chip with what lies behind its values",
        TRITON_REDUCE,
        "dgamma = over_slab(tl.where(mask, db * d, 0), CHANNEL_IS_COLUMN) * rstd",
        "dgamma = over_slab(db * z, CHANNEL_IS_COLUMN) * rstd",
    ),
    Mutation(
        "bn_bwd_apply",
        "triton: without the projection on z on chip",
        TRITON_REDUCE,
        "db = (db - shift_db) - d * shift_z",
        "db = db - shift_db",
    ),
    Mutation(
        "bn_fwd_apply",
        "triton: gamma forgotten",
        TRITON_FWD,
        "scale = load_channels(gamma_ptr, c, c_mask, 1, ACC) * tl.load(rstd_ptr + c, c_mask, 0)",
        "scale = tl.load(rstd_ptr + c, c_mask, 0)",
    ),
    Mutation(
        "bn_fwd_apply",
        "triton: bits from the pre-activation before rounding",
        TRITON_ACTIVATION,
        "2.0**-134 if DTYPE == tl.bfloat16",
        "0.0 if DTYPE == tl.bfloat16",
    ),
    Mutation(
        "bn_fwd_apply",
        "triton: bits in reverse",
        TRITON_ACTIVATION,
        "tl.sum(eight << shifts, 2)",
        "tl.sum(eight << (7 - shifts), 2)",
    ),
    Mutation(
        "bn_bwd_reduce",
        "triton: z not centred",
        TRITON_BWD,
        "db * (z - mean), 0)",
        "db * z, 0)",
    ),
    Mutation(
        "bn_bwd_reduce",
        "triton: dgamma not scaled by rstd",
        TRITON_BWD,
        "dgamma = products * tl.load(rstd_ptr + c, mask, 0)",
        "dgamma = products",
    ),
    Mutation(
        "bn_bwd_apply",
        "triton: without the mean of db",
        TRITON_BWD,
        "(db - shift_db) - ",
        "db - ",
    ),
    Mutation(
        "conv_fwd_reduce",
        "triton: the row above the input is read",
        TRITON_CONV_FWD,
        "m_mask & (ih >= 0) & (ih < height)",
        "m_mask & (ih < height)",
    ),
    Mutation(
        "conv_fwd_reduce",
        "triton: moments of what was not rounded",
        TRITON_CONV_FWD,
        "value = tl.where(mask, z.to(ACC), 0)",
        "value = tl.where(mask, acc + bias[None, :], 0)",
    ),
    Mutation(
        "conv_fwd_reduce",
        "triton: padding takes part in the prologue",
        TRITON_CONV_FWD,
        "tl.where(valid, act_value(pre, ACT, SLOPE), 0)",
        "act_value(pre, ACT, SLOPE)",
    ),
    Mutation(
        "bn_fwd_apply",
        "triton: the residual is not normalised",
        TRITON_FWD,
        "        if residual_norm is not None:\n            mean, scale",
        "        if False:\n            mean, scale",
    ),
    Mutation(
        "conv_dgrad",
        "triton: kernel rotated",
        TRITON_CONV_BWD,
        "PADDING_H - tap // TAPS_W * DILATION_H",
        "PADDING_H - (TAPS_H - 1 - tap // TAPS_W) * DILATION_H",
    ),
    Mutation(
        "conv_dgrad",
        "triton: strides meet the first phase alone",
        TRITON_CONV_BWD,
        "iw = column * STRIDE_W + phase % STRIDE_W",
        "iw = column * STRIDE_W",
    ),
    Mutation(
        "conv_dgrad",
        "triton: the prologue forgets the mean of db",
        TRITON_CONV_BWD,
        "return ((db - shift_db[None, :]) - ",
        "return (db - ",
    ),
    Mutation(
        "conv_dgrad",
        "triton: what is added is forgotten",
        TRITON_CONV_BWD,
        "if add_ptr is not None:",
        "if False:",
    ),
    Mutation(
        "bn_bwd_reduce",
        "triton: in the epilogue without the bits",
        TRITON_CONV_BWD,
        "dx = db.to(DTYPE)",
        "dx = dx",
    ),
    Mutation(
        "bn_bwd_reduce",
        "triton: beside with the mean of the one below",
        TRITON_CONV_BWD,
        "mean = tl.load(beside.mean + j, j_mask, 0)",
        "mean = mean",
    ),
    Mutation(
        "chain",
        "sums of a unit while gradients are still to come",
        CHAIN,
        "if k >= 0 and self.remaining[k] == 0:",
        "if k >= 0:",
    ),
    Mutation(
        "chain",
        "the gradient beside one that has another reader",
        CHAIN,
        "if self.remaining[r] != 1 or self.flowing[r] is not None:",
        "if self.flowing[r] is not None:",
    ),
    Mutation(
        "chain",
        "the gradient beside one into which another reader's has flown",
        CHAIN,
        "if self.remaining[r] != 1 or self.flowing[r] is not None:",
        "if self.remaining[r] != 1:",
    ),
    Mutation(
        "chain",
        "a masked gradient is masked again",
        CHAIN,
        'act = "identity" if i in self.masked else spec.act',
        "act = spec.act",
    ),
    Mutation(
        "chain",
        "a unit without z whose input nobody can recompute",
        CHAIN,
        "            spec.source in self.recomputable\n            and self.fuses.gram(i, x)",
        "            self.fuses.gram(i, x)",
    ),
    Mutation(
        "chain",
        "a pooled unit's input is taken for its output",
        CHAIN,
        "if spec.normalize and residual is None and z is not None and spec.pool is None:",
        "if spec.normalize and residual is None and z is not None:",
    ),
    Mutation(
        "chain",
        "a unit without z is recomputed from it",
        CHAIN,
        "residual is None and z is not None and spec.pool is None:",
        "residual is None and spec.pool is None:",
    ),
    Mutation(
        "chain",
        "a residual waits for its activation",
        CHAIN,
        'len(readers) > 1 or own.act != "identity" or spec.act in SMOOTH_ACTS',
        "len(readers) > 1 or spec.act in SMOOTH_ACTS",
    ),
    Mutation(
        "depthwise",
        "triton: the padding is normalised",
        TRITON_DEPTHWISE,
        "x = tl.where(valid, y, 0)",
        "x = y",
    ),
    Mutation(
        "depthwise",
        "triton: pixels between those of a stride read their neighbours' gradient",
        TRITON_DEPTHWISE,
        "inside = inside & (down % STRIDE_H == 0) & (across % STRIDE_W == 0)",
        "inside = inside & (down % STRIDE_H == 0)",
    ),
    Mutation(
        "depthwise",
        "triton: one tap for all",
        TRITON_DEPTHWISE,
        "acc = tl.fma(dz, tl.broadcast_to(w[None, :], [BLOCK_M, BLOCK_C]), acc)",
        "acc = acc + dz",
    ),
    Mutation(
        "gram",
        "triton: the origin stays in the mean",
        TRITON_GRAM,
        "mean = mean_j + tl.load(origin_ptr + j, j < channels, 0)",
        "mean = mean_j",
    ),
    Mutation(
        "gram",
        "triton: products below the diagonal are not mirrored",
        TRITON_GRAM,
        "if one < other:",
        "if False:",
    ),
    Mutation(
        "gram",
        "triton: second moments around the origin",
        TRITON_GRAM,
        "gram = products - sum_i[:, None] * mean_j[None, :]",
        "gram = products",
    ),
    Mutation(
        "gram",
        "triton: statistics without the bias",
        TRITON_GRAM,
        "mean = tl.load(bias_ptr + k, mask, 0).to(ACC)",
        "mean = mean",
    ),
    Mutation(
        "gram",
        "triton: a variance below 0",
        TRITON_GRAM,
        "m2 = tl.where(m2 < 0, 0, m2)",
        "m2 = m2",
    ),
    Mutation(
        "gram",
        "triton: the input is not centred",
        TRITON_GRAM,
        "x = load_source(z_ptr, norm, mean_x, m, m_mask, j",
        "x = load_source(z_ptr, norm, mean_x * 0, m, m_mask, j",
    ),
    Mutation(
        "gram",
        "triton: bits of another place",
        TRITON_GRAM,
        "passes = unpack_bits(tl.load(bits_ptr + places, inside, 0), BLOCK_M, BLOCK_K)",
        "passes = unpack_bits(tl.load(bits_ptr + places * 0, inside, 0), BLOCK_M, BLOCK_K)",
    ),
    Mutation(
        "gram",
        "triton: dbeta once per block of input channels",
        TRITON_GRAM,
        "tl.where(tl.program_id(1) == 0, sums, 0)",
        "sums",
    ),
    Mutation(
        "gram",
        "triton: Q without gamma",
        TRITON_GRAM,
        "factor = load_channels(gamma_ptr, k, k_mask, 1, ACC) * rstd",
        "factor = rstd",
    ),
    Mutation(
        "gram",
        "triton: dx without Q",
        TRITON_CONV_BWD,
        "acc = tl.dot(x, q, acc, input_precision=PRECISION, out_dtype=ACC)",
        "acc = acc",
    ),
    # CUDA, in the emulator
    Mutation(
        "bn_fwd_reduce",
        "cuda: threads merged without the distance of their means",
        CUDA_FWD,
        "m2[j] += other_m2[j] + step * (step * (n * weight));",
        "m2[j] += other_m2[j];",
    ),
    Mutation(
        "bn_fwd_reduce",
        "cuda: places outside of a slot count",
        CUDA_FWD,
        "counted[u] = kColumns ? slot.is_there() : slot.places();",
        "counted[u] = 0xffu;",
    ),
    Mutation(
        "bn_fwd_reduce",
        "cuda: splits merged without the distance of their means",
        CUDA_FWD,
        "return load_part(s, 2) + d * (d * load_part(s, 0));",
        "return load_part(s, 2);",
    ),
    Mutation(
        "bn_fwd_reduce",
        "cuda: num_batches_tracked counted once per tile",
        CUDA_FWD,
        "a.tracked && is_last_block(a.workspace.counters + gridDim.x, gridDim.x) && threadIdx.x == 0",
        "a.tracked && threadIdx.x == 0",
    ),
    Mutation(
        "bn_fwd_reduce",
        "cuda: no fence before the last block reads",
        CUDA_BLOCKS,
        "  if (threadIdx.x == 0) {\n    __threadfence();\n",
        "  if (threadIdx.x == 0) {\n",
    ),
    Mutation(
        "bn_fwd_reduce",
        "cuda: the counter is not left at 0",
        CUDA_BLOCKS,
        "atomicInc(counter, blocks - 1)",
        "atomicInc(counter, blocks)",
    ),
    Mutation(
        "bn_fwd_reduce",
        "cuda: no barrier between the steps of a sum",
        CUDA_BLOCKS,
        "    __syncthreads();\n    if (static_cast<int>(threadIdx.x) < half)",
        "    if (static_cast<int>(threadIdx.x) < half)",
    ),
    Mutation(
        "bn_fwd_apply",
        "cuda: channels read before they are there",
        CUDA_FWD,
        "      __syncthreads();\n      if constexpr (kColumns) channel =",
        "      if constexpr (kColumns) channel =",
    ),
    Mutation(
        "bn_fwd_apply",
        "cuda: bits from the pre-activation before rounding",
        CUDA_FWD,
        "act.passes(rounded<T>(pre))) << i",
        "act.passes(pre)) << i",
    ),
    Mutation(
        "bn_fwd_apply",
        "cuda: slots that share a byte of bits overwrite each other",
        CUDA_SLOTS,
        "word |= __shfl_down_sync(kAllLanes, word, lanes) << (lanes * w);",
        "word |= 0;",
    ),
    Mutation(
        "bn_fwd_apply",
        "cuda: the end of a partial slot is written too",
        CUDA_SLOTS,
        "if (s.has(i)) to[s.at + i] = narrowed<T>(x[i]);",
        "if (i >= s.lo && s.hi > s.lo) to[s.at + i] = narrowed<T>(x[i]);",
    ),
    Mutation(
        "bn_fwd_apply",
        "cuda: whole accesses where lines are not aligned",
        CUDA_SLOTS,
        "if (wide && s.lo == 0 && s.hi == w) {\n    __stcs",
        "if (s.lo == 0 && s.hi == w) {\n    __stcs",
    ),
    Mutation(
        "bn_fwd_apply",
        "cuda: offsets of 32 bits",
        CUDA_SLOTS,
        "const int64_t begin = line * v.length, first = k * w;",
        "const int64_t begin = static_cast<int>(line * v.length), first = k * w;",
    ),
    Mutation(
        "bn_bwd_reduce",
        "cuda: z not centred",
        CUDA_BWD,
        "fma(db, loaded.z[u][i] - channel.mean[channel.place(i)], part[1][i])",
        "fma(db, loaded.z[u][i], part[1][i])",
    ),
    Mutation(
        "bn_bwd_reduce",
        "cuda: dgamma not scaled by rstd",
        CUDA_BWD,
        "const A dgamma = db_z * static_cast<const A*>(a.gradient.affine.rstd)[c];",
        "const A dgamma = db_z;",
    ),
    Mutation(
        "bn_bwd_reduce",
        "cuda: the last warp is forgotten",
        CUDA_BWD,
        "for (int w = 0; w < kWarps; ++w) sum +=",
        "for (int w = 0; w < kWarps - 1; ++w) sum +=",
    ),
    Mutation(
        "bn_bwd_apply",
        "cuda: without the mean of db",
        CUDA_BWD,
        "centred = (db[i] - shifts.db[j]) - ",
        "centred = db[i] - ",
    ),
    Mutation(
        "bn_bwd_apply",
        "cuda: mask from the pre-activation before rounding",
        CUDA_BWD,
        "act.masked(act.passes(rounded<T>(pre)), grad)",
        "act.masked(act.passes(pre), grad)",
    ),
]


def problems() -> list[str]:
    """What is wrong with the table: texts that do not occur exactly once, mutants that change nothing."""
    found = []
    for m in MUTATIONS:
        path = ROOT / m.file
        times = path.read_text().count(m.old) if path.exists() else 0
        if times != 1:
            found.append(
                f"{m.phase} / {m.name}: {m.old!r} occurs {times} times in {m.file}, not once"
            )
        if m.old == m.new:
            found.append(f"{m.phase} / {m.name}: old and new text are the same")
    names = [(m.phase, m.name) for m in MUTATIONS]
    found += [f"{n} is there twice" for n in {n for n in names if names.count(n) > 1}]
    return found


def copy_tree(to: Path) -> None:
    """The sources and tests, without what was built from them."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=unwanted)
        elif source.exists():
            shutil.copy2(source, to / name)
    # As an installation has it: without this the tree's own would be imported.
    (to / "bnfast" / "triton_kernels").symlink_to(to / "triton_kernels")
    # A mutant is as wrong at -O1 and in the baseline alone, and builds in a fifth of the time.
    setup = to / "setup.py"
    setup.write_text(setup.read_text().replace('"-O3"', '"-O1"'))
    cpu = to / "csrc" / "cpu"
    for name in ("capability_avx2.cpp", "capability_avx512.cpp"):
        (cpu / name).unlink()
    choice = cpu / "capability.cpp"
    choice.write_text(choice.read_text().replace("defined(__x86_64__)", "0"))


def run(command: list[str], tree: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    # Which the baseline uses only when told to.
    env["BNFAST_WINOGRAD"] = env["BNFAST_POINTWISE"] = "1"
    # CUDA kernels run in the emulator, which builds them itself.
    env["BNFAST_FORCE_CUDA"] = "0"
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def build(tree: Path) -> str | None:
    """Builds the extension in place; the end of the output where that fails."""
    done = run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, MAX_JOBS="1")
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]


def first_failure(tree: Path, tests: tuple[str, ...]) -> str | None:
    """The first of these tests that fails; None where all pass. RuntimeError where they could not run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    interpret = "1" if tests is TRITON_TESTS else "0"
    done = run(command, tree, TRITON_INTERPRET=interpret, OMP_NUM_THREADS="1")
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    crashed = done.returncode < 0  # a signal, as from an access out of bounds
    if crashed or (done.returncode == 1 and failed):
        return (
            failed[0].split(" - ")[0].split("::", 1)[-1] if failed else f"signal {-done.returncode}"
        )
    raise RuntimeError(f"pytest ended with status {done.returncode}:\n{done.stdout[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose phase or name contains this")
    parser.add_argument("--check", action="store_true", help="verify the table, build nothing")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="mutants that are tried at once"
    )
    args = parser.parse_args()
    wrong = problems()
    if wrong:
        print("\n".join(wrong))
        return 1
    if args.check:
        print(f"{len(MUTATIONS)} mutations, each text found once")
        return 0
    chosen = [m for m in MUTATIONS if args.only in f"{m.phase} {m.name}"]
    if not chosen:
        parser.error(f"--only {args.only!r} names no mutant")

    workers = max(1, min(args.workers, len(chosen)))
    with (
        tempfile.TemporaryDirectory(prefix="bnfast-mutations-") as folder,
        ThreadPoolExecutor(workers) as pool,
    ):
        trees = [Path(folder) / str(i) for i in range(workers)]
        for tree in trees:
            tree.mkdir()
            copy_tree(tree)
        suites = {m.tests if m.is_triton or m.is_cuda else TESTS for m in chosen}
        error = next(filter(None, pool.map(build, trees)), None)
        error = error or next(
            filter(None, map(first_failure, trees[:1] * len(suites), suites)), None
        )
        if error:
            print(f"the unmutated copy is not green: {error}")
            return 1
        free = queue.SimpleQueue()
        for tree in trees:
            free.put(tree)
        # Neighbours in the same file share what has to be compiled again.
        chosen.sort(key=lambda m: m.file)
        found = list(pool.map(lambda m: tried(m, free), chosen))
    print(f"{sum(found)} of {len(chosen)} mutants found")
    return 0 if all(found) else 1


def tried(m: Mutation, free: queue.SimpleQueue) -> bool:
    """Plants one mutant into a tree that is free, prints its row, takes it out again. True if the tests found it."""
    tree, start = free.get(), time.monotonic()
    path = tree / m.file
    original = path.read_text()
    path.write_text(original.replace(m.old, m.new))
    try:
        # Mutants of Python are built too: the last one's kernels may still be there.
        error = build(tree)
        seen = None if error else first_failure(tree, m.tests)
    finally:
        path.write_text(original)
        free.put(tree)
    verdict = f"does not build:\n{error}" if error else (seen or "SURVIVED")
    print(f"{m.phase:16} {m.name:55} {time.monotonic() - start:5.0f} s  {verdict}", flush=True)
    return seen is not None


if __name__ == "__main__":
    sys.exit(main())
