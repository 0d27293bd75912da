// What AMX adds to AVX512_BF16: matrices of 16 rows in registers, multiplied in one instruction.
#include "capability_prelude.h"

#ifdef BNFAST_HAS_AMX
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#endif

#define BNFAST_NAMESPACE amx
#define BNFAST_VECTOR_BYTES 64
#define BNFAST_ROUNDS_BF16
#include "conv_dot_kernels.h"

namespace bnfast::amx {
namespace {

// The shapes of the eight registers, as the instruction reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// 16 or 32 positions times one or two blocks of output channels. Registers: 0 to 3 sums, 4 and 5 inputs [16, step], 6 and 7 weights
// [step / 2, 16, 2].
class MatrixTile {
 public:
  explicit MatrixTile(const DotConv& d) {
    TileShapes shapes;
    for (int i = 0; i < 8; ++i) shapes.rows[i] = 16, shapes.row_bytes[i] = 64;
    shapes.row_bytes[4] = shapes.row_bytes[5] = static_cast<uint16_t>(d.step * sizeof(bf16));
    shapes.rows[6] = shapes.rows[7] = static_cast<uint8_t>(d.step / 2);
    _tile_loadconfig(&shapes);
  }
  ~MatrixTile() { _tile_release(); }
  MatrixTile(const MatrixTile&) = delete;
  MatrixTile& operator=(const MatrixTile&) = delete;

  static int64_t rows(int64_t left) { return left > 16 ? 32 : 16; }
  static int64_t lines(const DotConv& d, int64_t positions) { return positions / 32 * (d.channels / d.step) * kLines; }

  template <int kBlocks, class F>
  static void product(const DotConv& d, const DotSpan& span, const bf16* x, const bf16* weights, int64_t rows, RunsAhead& ahead, F put) {
    if (rows == 32) tile<2, kBlocks>(d, span, x, weights, ahead, put);
    else tile<1, kBlocks>(d, span, x, weights, ahead, put);
  }

 private:
  static constexpr int kLines = 8;   // calls of RunsAhead::line() beside the products of a step

  template <int kTiles, int kBlocks, class F>
  static BNFAST_INLINE void tile(const DotConv& d, const DotSpan& span, const bf16* x, const bf16* weights, RunsAhead& ahead, F put) {
    constexpr bool kTwoTiles = kTiles == 2, kTwoBlocks = kBlocks == 2;
    const int64_t row_bytes = d.x_step * sizeof(bf16), step = d.step, second = 16 * d.x_step;
    _tile_zero(0);
    if constexpr (kTwoBlocks) _tile_zero(1);
    if constexpr (kTwoTiles) _tile_zero(2);
    if constexpr (kTwoTiles && kTwoBlocks) _tile_zero(3);
    auto walk = ahead.walk();
    for (int64_t t = 0; t < span.tap_count; ++t) {
      const bf16* const from = x + span.taps[t].input;
      const bf16* w = weights + span.taps[t].weights;
      for (int64_t c = 0; c < d.channels; c += step, w += step * kBlock) {
        for (int i = 0; i < kLines; ++i) walk.line();
        _tile_loadd(6, w, 64);
        _tile_loadd(4, from + c, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kTwoBlocks) {
          _tile_loadd(7, w + d.block_elements, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kTwoTiles) {
          _tile_loadd(5, from + c + second, row_bytes);
          _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (kTwoTiles && kTwoBlocks) _tile_dpbf16ps(3, 5, 7);
      }
    }
    ahead.walked(walk);
    alignas(64) float sums[4][16][kBlock];
    _tile_stored(0, sums[0], 64);
    if constexpr (kTwoBlocks) _tile_stored(1, sums[1], 64);
    if constexpr (kTwoTiles) _tile_stored(2, sums[2], 64);
    if constexpr (kTwoTiles && kTwoBlocks) _tile_stored(3, sums[3], 64);
    for (int i = 0; i < 16 * kTiles; ++i) {
      unrolled<kBlocks>([&](auto b) BNFAST_INLINE_LAMBDA { put(i, b, load_block(sums[i / 16 * 2 + b][i % 16])); });
    }
  }
};

}  // namespace

extern const DotKernels kernels;
const DotKernels kernels = {dot_product<MatrixTile>};

}  // namespace bnfast::amx

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // BNFAST_HAS_AMX
