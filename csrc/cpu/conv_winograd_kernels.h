// conv_fwd and conv_dgrad of 3x3 convolutions of stride 1 and 2 in Winograd's form (conv_winograd.h), float32 and bfloat16.
// Per element of x: read 2.25 times from the cache (tiles overlap), once from memory (or made by the phase in front, row by row);
// y is written once. The transformed tiles never leave the cache. Multiplications per pair of channels and output: 2.25 or, of wide tiles,
// 1.78 (stride 1) and 5.06 (stride 2), against 9 of the direct form; of a 7 x 7 kernel with stride 2 10.24 against 49.
#pragma once

#include <algorithm>

#include "conv_winograd.h"
#include "gemm_kernels.h"
#include "input_rows.h"
#include "vec.h"

namespace bnfast::BNFAST_NAMESPACE {

BNFAST_INLINE FloatBlock fma(const FloatBlock& a, float b, const FloatBlock& c) {
  return FloatBlock::make([&](int p) BNFAST_INLINE_LAMBDA { return fma(a.part[p], FloatVec{} + b, c.part[p]); });
}

BNFAST_INLINE FloatBlock operator*(const FloatBlock& a, float b) {
  return FloatBlock::make([&](int p) BNFAST_INLINE_LAMBDA { return a.part[p] * b; });
}

// The forms along one side: input is B^T d, output is A^T m. With a number of outputs in front: of a short tile, which has only so many;
// values that it has not are left as they are.
struct Same {
  static constexpr WinogradForm kForm = kSame;
  static constexpr bool kUnrolled = true;
  static BNFAST_INLINE void input(const FloatBlock (&d)[6], FloatBlock (&v)[6]) {
    const FloatBlock even = fma(d[2], -4, d[4]), odd = fma(d[1], -4, d[3]);
    const FloatBlock even2 = d[4] - d[2], odd2 = d[3] - d[1];
    v[0] = fma(d[0], 4, fma(d[2], -5, d[4]));
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = fma(odd2, 2, even2);
    v[4] = fma(odd2, -2, even2);
    v[5] = fma(d[1], 4, fma(d[3], -5, d[5]));
  }
  static BNFAST_INLINE void input(int outputs, const FloatBlock (&d)[6], FloatBlock (&v)[6]) {
    switch (outputs) {
      case 1:
        v[0] = (d[0] - d[1]) * 4;
        v[1] = d[1] * -6;
        v[5] = d[2] - d[1];
        return;
      case 2:
        v[0] = (d[0] - d[2]) * 4;
        v[1] = (d[1] + d[2]) * -3;
        v[2] = (d[1] - d[2]) * 3;
        v[5] = d[3] - d[1];
        return;
      case 3: {
        const FloatBlock odd = d[3] - d[1];
        v[0] = fma(d[0] - d[2], 4, odd * 2);
        v[1] = fma(d[1], -6, (d[3] - d[2]) * 3);
        v[2] = fma(d[1], 2, fma(d[2], -3, d[3]));
        v[3] = odd * 4;
        v[5] = fma(odd, -2, d[4] - d[2]);
        return;
      }
      default: input(d, v);
    }
  }
  static BNFAST_INLINE void output(const FloatBlock (&m)[6], FloatBlock (&y)[4]) {
    const FloatBlock sum1 = m[1] + m[2], difference1 = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    y[0] = m[0] + sum1 + sum2;
    y[1] = fma(difference2, 2, difference1);
    y[2] = fma(sum2, 4, sum1);
    y[3] = fma(difference2, 8, difference1) + m[5];
  }
  static BNFAST_INLINE void output(int outputs, const FloatBlock (&m)[6], FloatBlock (&y)[4]) {
    switch (outputs) {
      case 1:
        y[0] = m[0] + m[1] + m[5];
        return;
      case 2:
        y[0] = m[0] + m[1] + m[2];
        y[1] = m[1] - m[2] + m[5];
        return;
      case 3: {
        const FloatBlock sum = m[1] + m[2];
        y[0] = m[0] + sum + m[3];
        y[1] = fma(m[3], 2, m[1] - m[2]);
        y[2] = fma(m[3], 4, sum) + m[5];
        return;
      }
      default: output(m, y);
    }
  }
};

struct Wide {
  static constexpr WinogradForm kForm = kWide;
  static constexpr bool kUnrolled = BNFAST_VECTOR_BYTES == 64;
  static BNFAST_INLINE void input(const FloatBlock (&d)[8], FloatBlock (&v)[8]) {
    const FloatBlock even_one = fma(d[4], -4.25f, d[2] + d[6]), odd_one = fma(d[3], -4.25f, d[1] + d[5]);
    const FloatBlock even_two = fma(d[2], 0.25f, fma(d[4], -1.25f, d[6])), odd_two = fma(d[1], 0.25f, fma(d[3], -1.25f, d[5]));
    const FloatBlock even_half = fma(d[2], 4, fma(d[4], -5, d[6])), odd_half = fma(d[1], 4, fma(d[3], -5, d[5]));
    v[0] = fma(d[2] - d[4], 5.25f, d[6] - d[0]);
    v[1] = even_one + odd_one;
    v[2] = even_one - odd_one;
    v[3] = fma(odd_two, 2, even_two);
    v[4] = fma(odd_two, -2, even_two);
    v[5] = fma(odd_half, 0.5f, even_half);
    v[6] = fma(odd_half, -0.5f, even_half);
    v[7] = fma(d[3] - d[5], 5.25f, d[7] - d[1]);
  }
  // Up to four outputs are taken through the points of Same. The weights of point p are those of Same over p^2 - 1/4, which v makes up for.
  static BNFAST_INLINE void input(int outputs, const FloatBlock (&d)[8], FloatBlock (&v)[8]) {
    if (outputs > 4) return input(d, v);
    FloatBlock few[6] = {};
    Same::input(outputs, {d[0], d[1], d[2], d[3], d[4], d[5]}, few);
    v[0] = few[0] * -0.25f;
    v[1] = few[1] * 0.75f;
    v[2] = few[2] * 0.75f;
    v[3] = few[3] * 3.75f;
    v[4] = few[4] * 3.75f;
    v[7] = few[5];
  }
  static BNFAST_INLINE void output(const FloatBlock (&m)[8], FloatBlock (&y)[6]) {
    const FloatBlock sum_one = m[1] + m[2], sum_two = m[3] + m[4], sum_half = m[5] + m[6];
    const FloatBlock difference_one = m[1] - m[2], difference_two = m[3] - m[4], difference_half = m[5] - m[6];
    y[0] = m[0] + sum_one + (sum_two + sum_half);
    y[1] = fma(difference_half, 0.5f, fma(difference_two, 2, difference_one));
    y[2] = fma(sum_half, 0.25f, fma(sum_two, 4, sum_one));
    y[3] = fma(difference_half, 0.125f, fma(difference_two, 8, difference_one));
    y[4] = fma(sum_half, 0.0625f, fma(sum_two, 16, sum_one));
    y[5] = fma(difference_half, 0.03125f, fma(difference_two, 32, difference_one)) + m[7];
  }
  static BNFAST_INLINE void output(int outputs, const FloatBlock (&m)[8], FloatBlock (&y)[6]) {
    if (outputs > 4) return output(m, y);
    FloatBlock few[4] = {};
    Same::output(outputs, {m[0], m[1], m[2], m[3], m[4], m[7]}, few);
    unrolled<4>([&](auto i) BNFAST_INLINE_LAMBDA { y[i] = few[i]; });
  }
};

// A kernel of one tap more has one output less: through the same points, whose values of infinity then belong to the output before.
struct Blocked {
  static constexpr WinogradForm kForm = kBlocked;
  static constexpr bool kUnrolled = BNFAST_VECTOR_BYTES == 64;
  static BNFAST_INLINE void input(const FloatBlock (&d)[8], FloatBlock (&v)[8]) { Wide::input(d, v); }
  static BNFAST_INLINE void input(int outputs, const FloatBlock (&d)[8], FloatBlock (&v)[8]) { Wide::input(outputs + 1, d, v); }
  static BNFAST_INLINE void output(const FloatBlock (&m)[8], FloatBlock (&y)[5]) {
    FloatBlock more[6];
    Wide::output({m[0], m[1], m[2], m[3], m[4], m[5], m[6], FloatBlock(0)}, more);
    unrolled<4>([&](auto i) BNFAST_INLINE_LAMBDA { y[i] = more[i]; });
    y[4] = more[4] + m[7];
  }
  static BNFAST_INLINE void output(int outputs, const FloatBlock (&m)[8], FloatBlock (&y)[5]) {
    if (outputs > 3) return output(m, y);
    FloatBlock more[6];
    Wide::output(outputs + 1, {m[0], m[1], m[2], m[3], m[4], m[5], m[6], FloatBlock(0)}, more);
    unrolled<4>([&](auto i) BNFAST_INLINE_LAMBDA { y[i] = i + 1 == outputs ? more[i] + m[7] : more[i]; });
  }
};

// F(4, 2), which both forms of stride 2 have for the outer taps.
struct OuterTaps {
  static BNFAST_INLINE void input(const FloatBlock (&d)[5], FloatBlock* v) {
    const FloatBlock outer = d[3] - d[1];
    v[0] = fma(d[0] - d[2], 2, outer);
    v[1] = fma(d[1], -2, d[3] - d[2]);
    v[2] = fma(d[1], 2, fma(d[2], -3, d[3]));
    v[3] = outer;
    v[4] = fma(outer, -2, d[4] - d[2]);
  }
  static BNFAST_INLINE void input(int outputs, const FloatBlock (&d)[5], FloatBlock* v) {
    switch (outputs) {
      case 0: return;
      case 1:
        v[0] = d[0] * 2;
        v[4] = d[1];
        return;
      case 2:
        v[0] = (d[0] - d[1]) * 2;
        v[1] = d[1] * -2;
        v[4] = d[2] - d[1];
        return;
      case 3:
        v[0] = (d[0] - d[2]) * 2;
        v[1] = (d[1] + d[2]) * -1;
        v[2] = (d[1] - d[2]) * 3;
        v[4] = d[3] - d[1];
        return;
      default: input(d, v);
    }
  }
  static BNFAST_INLINE void output(const FloatBlock* m, FloatBlock (&y)[4]) {
    const FloatBlock sum = m[1] + m[2], difference = m[1] - m[2];
    y[0] = m[0] + sum + m[3];
    y[1] = fma(m[3], 2, difference);
    y[2] = fma(m[3], 4, sum);
    y[3] = fma(m[3], 8, difference) + m[4];
  }
  static BNFAST_INLINE void output(int outputs, const FloatBlock* m, FloatBlock (&y)[4]) {
    switch (outputs) {
      case 0: return;
      case 1:
        y[0] = m[0] + m[4];
        return;
      case 2:
        y[0] = m[0] + m[1];
        y[1] = m[1] + m[4];
        return;
      case 3:
        y[0] = m[0] + m[1] + m[2];
        y[1] = m[1] - m[2];
        y[2] = m[1] + m[2] + m[4];
        return;
      default: output(m, y);
    }
  }
};
struct Halved {
  static constexpr WinogradForm kForm = kHalved;
  static constexpr bool kUnrolled = false;
  static BNFAST_INLINE void input(const FloatBlock (&d)[9], FloatBlock (&v)[9]) {
    OuterTaps::input({d[0], d[2], d[4], d[6], d[8]}, v);
    unrolled<4>([&](auto i) BNFAST_INLINE_LAMBDA { v[5 + i] = d[2 * i + 1]; });
  }
  static BNFAST_INLINE void input(int outputs, const FloatBlock (&d)[9], FloatBlock (&v)[9]) {
    OuterTaps::input(outputs, {d[0], d[2], d[4], d[6], d[8]}, v);
    for (int i = 0; i < outputs; ++i) v[5 + i] = d[2 * i + 1];
  }
  static BNFAST_INLINE void output(const FloatBlock (&m)[9], FloatBlock (&y)[4]) {
    OuterTaps::output(m, y);
    unrolled<4>([&](auto i) BNFAST_INLINE_LAMBDA { y[i] = y[i] + m[5 + i]; });
  }
  static BNFAST_INLINE void output(int outputs, const FloatBlock (&m)[9], FloatBlock (&y)[4]) {
    OuterTaps::output(outputs, m, y);
    for (int i = 0; i < outputs; ++i) y[i] = y[i] + m[5 + i];
  }
};
struct Doubled {
  static constexpr WinogradForm kForm = kDoubled;
  static constexpr bool kUnrolled = false;
  static BNFAST_INLINE void input(const FloatBlock (&d)[5], FloatBlock (&v)[9]) {
    OuterTaps::input(d, v);
    unrolled<4>([&](auto i) BNFAST_INLINE_LAMBDA { v[5 + i] = d[i]; });
  }
  static BNFAST_INLINE void input(int outputs, const FloatBlock (&d)[5], FloatBlock (&v)[9]) {
    OuterTaps::input(outputs / 2, d, v);
    for (int i = 0; i < (outputs + 1) / 2; ++i) v[5 + i] = d[i];
  }
  static BNFAST_INLINE void output(const FloatBlock (&m)[9], FloatBlock (&y)[8]) {
    FloatBlock outer[4];
    OuterTaps::output(m, outer);
    unrolled<4>([&](auto i) BNFAST_INLINE_LAMBDA {
      y[2 * i] = m[5 + i];
      y[2 * i + 1] = outer[i];
    });
  }
  static BNFAST_INLINE void output(int outputs, const FloatBlock (&m)[9], FloatBlock (&y)[8]) {
    FloatBlock outer[4];
    OuterTaps::output(outputs / 2, m, outer);
    for (int i = 0; i < outputs; ++i) y[i] = i % 2 == 0 ? m[5 + i / 2] : outer[i / 2];
  }
};

// f(0), ..., f(N - 1): unrolled where what they index lives in registers, a loop where there is too much of it: too much for the compiler as
// well, where a FloatBlock is several vectors.
template <bool kUnrolled, int N, class F>
BNFAST_INLINE void each(F f) {
  if constexpr (kUnrolled) {
    unrolled<N>(f);
  } else {
    for (int i = 0; i < N; ++i) f(i);
  }
}

// Counts tiles without dividing.
struct TileCounter {
  int64_t columns, rows, tile, row, row_of_image, image, column;
  TileCounter(int64_t tile, const WinogradConv& d)
      : columns(d.tile_columns), rows(d.tile_rows), tile(tile), row(tile / columns), row_of_image(row % rows), image(row / rows),
        column(tile % columns) {}
  void next() {
    ++tile;
    if (++column < columns) return;
    column = 0, ++row;
    if (++row_of_image == rows) row_of_image = 0, ++image;
  }
};

// The tiles that are transformed together, by kind. In scratch they lie in this order: then a value that some kinds lack lies at the same row
// in every tile that has it, but for tiles short down, where tiles short across lack it.
enum TileKind { kWhole, kShortAcross, kShortDown, kShortBoth, kTileKinds };
template <class Form>
class Tiles {
 public:
  // The tiles [begin, end), counted over images.
  Tiles(const WinogradConv& d, int64_t begin, int64_t end) : outputs_down_(d.last_down), outputs_across_(d.last_across) {
    if (outputs_down_ == kOut && outputs_across_ == kOut) count_[kWhole] = end - begin;
    else for (TileCounter at(begin, d); at.tile < end; at.next()) ++count_[kind(at)];
    for (int value = 0; value < kPoints; ++value) {
      short_down_has_[value] = Form::kForm.has(outputs_down_, value);
      short_across_has_[value] = Form::kForm.has(outputs_across_, value);
    }
    for (int down = 0; down < 2; ++down) {
      for (int across = 0; across < 2; ++across) {
        rows_[down][across] = count_[kWhole] + across * count_[kShortAcross] + down * (count_[kShortDown] + across * count_[kShortBoth]);
      }
    }
  }
  BNFAST_INLINE TileKind kind(const TileCounter& at) const {
    const bool across = at.column + 1 == at.columns && outputs_across_ < kOut;
    const bool down = at.row_of_image + 1 == at.rows && outputs_down_ < kOut;
    return static_cast<TileKind>(2 * down + across);
  }
  // Outputs of a tile.
  BNFAST_INLINE int down(TileKind kind) const { return kind >= kShortDown ? outputs_down_ : kOut; }
  BNFAST_INLINE int across(TileKind kind) const { return kind % 2 ? outputs_across_ : kOut; }
  // The row of the first tile of a kind.
  int64_t first(int kind) const {
    int64_t rows = 0;
    for (int before = 0; before < kind; ++before) rows += count_[before];
    return rows;
  }
  // Rows of value (i, j), and of all values.
  int64_t rows(int i, int j) const { return rows_[short_down_has_[i]][short_across_has_[j]]; }
  int64_t all_rows() const {
    const int64_t down = Form::kForm.values(outputs_down_), across = Form::kForm.values(outputs_across_);
    const int64_t less_down = kPoints - down, less_across = kPoints - across;
    return down * (across * rows_[1][1] + less_across * rows_[1][0]) + less_down * (across * rows_[0][1] + less_across * rows_[0][0]);
  }
  // How much nearer value (., j) of a tile lies.
  BNFAST_INLINE int64_t missing(TileKind kind, int j) const {
    return kind == kShortDown && !short_across_has_[j] ? count_[kShortAcross] : 0;
  }

 private:
  static constexpr int kOut = Form::kForm.out, kPoints = Form::kForm.points;
  int outputs_down_, outputs_across_;   // of short tiles
  int64_t count_[kTileKinds] = {};
  bool short_down_has_[kPoints], short_across_has_[kPoints];
  int64_t rows_[2][2];   // of a value that tiles short down have, and tiles short across
};

// Up to eight places at equal steps. One pointer reaches them all by addressing alone; it is hidden from the compiler, which would
// compute all that a tile has ahead and keep them in memory.
template <class T>
class EvenPlaces {
 public:
  BNFAST_INLINE EvenPlaces(T* first, int64_t step)
      : first_(first), step_(step * static_cast<int64_t>(sizeof(T))), step3_(3 * step_), step5_(5 * step_), step7_(7 * step_) {
    asm("" : "+r"(first_));
  }
  template <int I>
  BNFAST_INLINE T* operator()(std::integral_constant<int, I>) const {
    static_assert(I < 8);
    return (T*)((char*)first_ + (I == 7 ? step7_ : I == 5 ? step5_ : I > 0 && I % 3 == 0 ? I / 3 * step3_ : I * step_));
  }

 private:
  T* first_;
  int64_t step_, step3_, step5_, step7_;
};

// Where the values of a tile lie: those of one point as [rows, columns], the points of one matrix one behind the other.
template <class Form, bool kStrided = Form::kForm.is_strided()>
class Places {
 public:
  static constexpr int kPoints = Form::kForm.points, kMatrices = Form::kForm.matrices;
  static constexpr int kShared = kPoints - kMatrices + 1;   // points of the last matrix

  Places(const WinogradConv& d, const Tiles<Form>& tiles, int64_t columns) {
    int64_t begin = 0;
    for (int a = 0; a < kMatrices; ++a) {
      for (int b = 0; b < kMatrices; ++b) {
        const int down = a + 1 == kMatrices ? kShared : 1, across = b + 1 == kMatrices ? kShared : 1;
        int64_t rows = 0;
        for (int i = a; i < a + down; ++i) {
          for (int j = b; j < b + across; ++j) {
            place_[i * kPoints + j] = begin + rows * columns;
            rows += tiles.rows(i, j);
          }
        }
        rows_[a * kMatrices + b] = rows;
        begin += down * across * d.tiles * columns + kWinogradLanes;
      }
    }
  }
  // Of the first tile that has it.
  BNFAST_INLINE int64_t operator()(int i, int j) const { return place_[i * kPoints + j]; }
  BNFAST_INLINE auto row(float* v, int i) const {
    return [=, this](int j) BNFAST_INLINE_LAMBDA { return v + (*this)(i, j); };
  }
  BNFAST_INLINE auto column(const float* m, int j) const {
    return [=, this](int i) BNFAST_INLINE_LAMBDA { return m + (*this)(i, j); };
  }
  int64_t matrix(int index) const { return (*this)(index / kMatrices, index % kMatrices); }
  int64_t rows(int matrix) const { return rows_[matrix]; }

 private:
  int64_t place_[kPoints * kPoints], rows_[kMatrices * kMatrices];
};
// A point is a matrix: no table.
template <class Form>
class Places<Form, false> {
 public:
  static constexpr int kPoints = Form::kForm.points;

  Places(const WinogradConv& d, const Tiles<Form>& tiles, int64_t columns) : step_(d.tiles * columns + kWinogradLanes) {
    for (int i = 0; i < kPoints * kPoints; ++i) rows_[i] = tiles.rows(i / kPoints, i % kPoints);
  }
  BNFAST_INLINE int64_t operator()(int i, int j) const { return (i * kPoints + j) * step_; }
  BNFAST_INLINE EvenPlaces<float> row(float* v, int i) const { return {v + i * kPoints * step_, step_}; }
  BNFAST_INLINE EvenPlaces<const float> column(const float* m, int j) const { return {m + j * step_, kPoints * step_}; }
  int64_t matrix(int index) const { return index * step_; }
  int64_t rows(int matrix) const { return rows_[matrix]; }

 private:
  int64_t step_, rows_[kPoints * kPoints];
};

// The places of a tile: rows of pixels at one step. Columns of places may be missing on either side.
template <class T, int kRows>
struct TilePlaces {
  T* row[kRows];
  int64_t step;
  template <class I, class J> BNFAST_INLINE T* operator()(I i, J j) const { return row[i] + j * step; }
  BNFAST_INLINE bool has(int) const { return true; }
};
template <class T, int kRows>
struct EdgePlaces : TilePlaces<T, kRows> {
  int64_t first, last;   // columns that exist
  BNFAST_INLINE bool has(int j) const { return j >= first && j < last; }
};

// sum(d) and sum(d^2) of d = y - centre over a tile's outputs of 16 channels, where they are wanted.
struct TileSums {
  bool wanted = false;
  FloatBlock centre = {}, sum = {}, square = {};

  // A row of outputs, of which those in [first, last) exist.
  template <int N>
  BNFAST_INLINE void add(const FloatBlock (&y)[N], int64_t first = 0, int64_t last = N) {
    if (!wanted) return;
    FloatBlock row_sum(0), row_square(0);
    unrolled<N>([&](auto j) BNFAST_INLINE_LAMBDA {
      if (j < first || j >= last) return;
      const FloatBlock d = y[j] - centre;
      row_sum = row_sum + d;
      row_square = row_square + d * d;
    });
    sum = sum + row_sum;
    square = square + row_square;
  }
};

// The moments of what the tiles of a unit put out, taken from the registers: bn_fwd_reduce without reading y. The centre of a channel is its
// mean over the unit's first tile. That tile's share of M2 bounds what a centre off the mean can cost: n (mean - centre)^2 of n outputs is at
// most n / 16 of M2, of which float32 keeps 7 digits.
class UnitMoments {
 public:
  UnitMoments(const WinogradConv& d, float* memory) : mean_(d.mean), m2_(d.m2), centre_(memory) {
    if (!mean_) return;
    step_ = WinogradConv::blocks(d.out_channels) * kBlock;
    std::fill(memory, memory + 3 * step_, 0.0f);
  }
  explicit operator bool() const { return mean_; }
  BNFAST_INLINE TileSums tile(int64_t k) const {
    if (!mean_) return {};
    return {true, load_block(centre_ + k), FloatBlock(0), FloatBlock(0)};
  }
  BNFAST_INLINE void add(const TileSums& sums, int64_t k) {
    if (!mean_) return;
    float *const sum = centre_ + step_ + k, *const square = sum + step_;
    store_block(sum, load_block(sum) + sums.sum);
    store_block(square, load_block(square) + sums.square);
  }
  // Of the first tile, whose sums are of centre 0 and which is to be added once more.
  BNFAST_INLINE void set_centre(const TileSums& sums, int64_t k, int64_t outputs) {
    store_block(centre_ + k, sums.sum * (1.0f / static_cast<float>(outputs)));
  }
  // Of the channels [first, last), from so many outputs.
  void finish(int64_t first, int64_t last, int64_t outputs) const {
    const double one_over = 1.0 / static_cast<double>(outputs);
    for (int64_t k = first; mean_ && k < last; ++k) {
      const double sum = centre_[step_ + k];
      mean_[k] = centre_[k] + sum * one_over;
      m2_[k] = centre_[2 * step_ + k] - sum * sum * one_over;
    }
  }

 private:
  double *mean_, *m2_;
  float* centre_;
  int64_t step_ = 0;
};

// The values of 16 channels from c on of a tile into v; places that are missing are zeros.
template <class Form, class P, class L>
BNFAST_INLINE void input_tile(const P& from, int64_t c, L lanes, float* v, const Places<Form>& places) {
  constexpr int kIn = Form::kForm.in, kPoints = Form::kForm.points;
  FloatBlock columns[kPoints * kIn];
  each<Form::kUnrolled, kIn>([&](auto j) BNFAST_INLINE_LAMBDA {
    FloatBlock d[kIn], t[kPoints] = {};
    if (from.has(j)) {
      unrolled<kIn>([&](auto i) BNFAST_INLINE_LAMBDA { d[i] = load(from(i, j) + c, lanes); });
      Form::input(d, t);
    }
    unrolled<kPoints>([&](auto i) BNFAST_INLINE_LAMBDA { columns[i * kIn + j] = t[i]; });
  });
  each<Form::kUnrolled, kPoints>([&](auto i) BNFAST_INLINE_LAMBDA {
    FloatBlock d[kIn], t[kPoints];
    unrolled<kIn>([&](auto j) BNFAST_INLINE_LAMBDA { d[j] = columns[i * kIn + j]; });
    Form::input(d, t);
    const auto to = places.row(v, i);
    unrolled<kPoints>([&](auto j) BNFAST_INLINE_LAMBDA { store_block(to(j), t[j]); });
  });
}

// 16 channels from k on of the places of a tile, from its products m.
template <class Form, class P, class L>
BNFAST_INLINE void output_tile(const float* m, const Places<Form>& places, const FloatBlock& bias, const P& to, int64_t k, L lanes,
                               TileSums& sums) {
  constexpr int kOut = Form::kForm.out, kPoints = Form::kForm.points;
  FloatBlock columns[kOut * kPoints];
  each<Form::kUnrolled, kPoints>([&](auto j) BNFAST_INLINE_LAMBDA {
    FloatBlock d[kPoints], t[kOut];
    const auto from = places.column(m, j);
    unrolled<kPoints>([&](auto i) BNFAST_INLINE_LAMBDA { d[i] = load_block(from(i)); });
    Form::output(d, t);
    unrolled<kOut>([&](auto i) BNFAST_INLINE_LAMBDA { columns[i * kPoints + j] = t[i]; });
  });
  each<Form::kUnrolled, kOut>([&](auto i) BNFAST_INLINE_LAMBDA {
    FloatBlock d[kPoints], t[kOut];
    unrolled<kPoints>([&](auto j) BNFAST_INLINE_LAMBDA { d[j] = columns[i * kPoints + j]; });
    Form::output(d, t);
    unrolled<kOut>([&](auto j) BNFAST_INLINE_LAMBDA { store(to(i, j) + k, t[j] = t[j] + bias, lanes); });
    sums.add(t);
  });
}

// The same of a tile that may be short, or of which the first outputs may be missing.
template <class Form, class P, class L>
BNFAST_INLINE void input_short_tile(const Tiles<Form>& tiles, TileKind kind, const P& from, int64_t c, L lanes, float* v, int64_t columns_of_v,
                                    const Places<Form>& places) {
  constexpr int kIn = Form::kForm.in, kPoints = Form::kForm.points;
  const int down = tiles.down(kind), across = tiles.across(kind);
  FloatBlock columns[kPoints * kIn];
  for (int j = 0; j < kIn; ++j) {
    FloatBlock d[kIn], t[kPoints] = {};
    if (from.has(j)) {
      unrolled<kIn>([&](auto i) BNFAST_INLINE_LAMBDA { d[i] = load(from(i, j) + c, lanes); });
      Form::input(down, d, t);
    }
    unrolled<kPoints>([&](auto i) BNFAST_INLINE_LAMBDA { columns[i * kIn + j] = t[i]; });
  }
  for (int i = 0; i < kPoints; ++i) {
    if (!Form::kForm.has(down, i)) continue;
    FloatBlock d[kIn], t[kPoints];
    unrolled<kIn>([&](auto j) BNFAST_INLINE_LAMBDA { d[j] = columns[i * kIn + j]; });
    Form::input(across, d, t);
    unrolled<kPoints>([&](auto j) BNFAST_INLINE_LAMBDA {
      if (Form::kForm.has(across, j)) store_block(v + places(i, j) - tiles.missing(kind, j) * columns_of_v, t[j]);
    });
  }
}
template <class Form, class P, class L>
BNFAST_INLINE void output_short_tile(const Tiles<Form>& tiles, TileKind kind, const float* m, int64_t columns_of_m, const Places<Form>& places,
                                     const FloatBlock& bias, const P& to, int64_t first_down, int64_t first_across, int64_t k,
                                     L lanes, TileSums& sums) {
  constexpr int kOut = Form::kForm.out, kPoints = Form::kForm.points;
  const int down = tiles.down(kind), across = tiles.across(kind);
  FloatBlock columns[kOut * kPoints];
  for (int j = 0; j < kPoints; ++j) {
    if (!Form::kForm.has(across, j)) continue;
    FloatBlock d[kPoints], t[kOut];
    const float* const from = m - tiles.missing(kind, j) * columns_of_m;
    unrolled<kPoints>([&](auto i) BNFAST_INLINE_LAMBDA {
      if (Form::kForm.has(down, i)) d[i] = load_block(from + places(i, j));
    });
    Form::output(down, d, t);
    unrolled<kOut>([&](auto i) BNFAST_INLINE_LAMBDA { columns[i * kPoints + j] = t[i]; });
  }
  for (int64_t i = first_down; i < down; ++i) {
    FloatBlock d[kPoints], t[kOut];
    unrolled<kPoints>([&](auto j) BNFAST_INLINE_LAMBDA { d[j] = columns[i * kPoints + j]; });
    Form::output(across, d, t);
    unrolled<kOut>([&](auto j) BNFAST_INLINE_LAMBDA {
      t[j] = t[j] + bias;
      if (j >= first_across && j < across) store(to(i, j) + k, t[j], lanes);
    });
    sums.add(t, first_across, across);
  }
}

// Channels that are summed in one go: the rounding errors of a sum grow with its length, those of a sum of sums much less.
constexpr int64_t kLongestSum = 64;

// m [kTiles, kBlocks * 16] = v [kTiles, channels] times kBlocks blocks of weights.
template <int kTiles, int kBlocks, class A>
BNFAST_INLINE void multiply_tiles(const float* v, int64_t v_step, const float* weights, int64_t channels, float* m, int64_t m_step,
                                  A& ahead) {
  for (int64_t c = 0; c < channels; c += kLongestSum) {
    multiply<kTiles, kBlocks>(v + c, v_step, weights + c * kBlock, channels * kBlock, std::min(kLongestSum, channels - c), ahead,
                              [&](auto t, auto b, const FloatBlock& sum) BNFAST_INLINE_LAMBDA {
                                float* const to = m + t * m_step + b * kBlock;
                                store_block(to, c > 0 ? load_block(to) + sum : sum);
                              });
  }
}

// Scratch holds a multiple of kWinogradRowGroup tiles.
constexpr int kWideTiles = BNFAST_VECTOR_BYTES == 64 ? kWideRows : kWinogradRowGroup;
static_assert(kWideTiles % kWinogradRowGroup == 0 && kWinogradRowGroup % kNarrowRows == 0);

template <int kBlocks, class A>
void multiply_rows(const float* v, int64_t v_step, const float* weights, int64_t channels, int64_t tiles, float* m, int64_t m_step,
                   A& ahead) {
  int64_t t = 0;
  if constexpr (BNFAST_VECTOR_BYTES == 64) {
    if (channels == kBlock && v_step == kBlock) {
      for (int b = 0; b < kBlocks; ++b) multiply_by_block(v, weights + b * kBlock * kBlock, tiles, m + b * kBlock, m_step, ahead);
      return;
    }
  }
  for (; t + kWideTiles <= tiles; t += kWideTiles) {
    multiply_tiles<kWideTiles, kBlocks>(v + t * v_step, v_step, weights, channels, m + t * m_step, m_step, ahead);
  }
  // Of many channels a panel of weights does not stay in the L1 cache: each group of rows fetches it anew.
  if constexpr (kWideTiles > 8) {
    if (t + 8 <= tiles) {
      multiply_tiles<8, kBlocks>(v + t * v_step, v_step, weights, channels, m + t * m_step, m_step, ahead);
      t += 8;
    }
  }
  for (; t < tiles; t += kNarrowRows) {
    multiply_tiles<kNarrowRows, kBlocks>(v + t * v_step, v_step, weights, channels, m + t * m_step, m_step, ahead);
  }
}

// Calls of RunsAhead::line() beside a transform of a tile.
template <class Form>
constexpr int kLinesPerTile = Form::kForm.points == 8 ? 16 : 8;

// What is needed next, and the weights of the next panel beside it.
struct RunsAndWeightsAhead {
  struct Walk {
    RunsAhead::Walk runs, weights;
    BNFAST_INLINE void line() {
      runs.line();
      weights.line();
    }
  };
  RunsAhead& runs;
  RunsAhead weights;
  BNFAST_INLINE Walk walk() const { return {runs.walk(), weights.walk()}; }
  BNFAST_INLINE void walked(const Walk& walk) {
    runs.walked(walk.runs);
    weights.walked(walk.weights);
  }
};

// The products of one panel of blocks at one point.
template <int kBlocks>
void multiply_panel(const WinogradConv& d, const float* v, const float* weights, const float* next_weights, int64_t rows, float* m,
                    RunsAhead& ahead) {
  const int64_t v_step = d.input_columns(), m_step = d.panel_columns();
  if (!d.fetches_weights) return multiply_rows<kBlocks>(v, v_step, weights, d.channels, rows, m, m_step, ahead);
  const Run run = {next_weights, kBlocks * d.channels * kBlock * static_cast<int64_t>(sizeof(float))};
  RunsAndWeightsAhead both = {ahead, RunsAhead(&run, 1, (rows + kWideTiles - 1) / kWideTiles * d.channels)};
  multiply_rows<kBlocks>(v, v_step, weights, d.channels, rows, m, m_step, both);
}

template <class Form, class T>
void winograd_tile_rows(const WinogradConv& d, int64_t begin, int64_t end, int64_t first, int64_t last, float* scratch) {
  constexpr int kIn = Form::kForm.in, kOut = Form::kForm.out, kMatrices = Form::kForm.matrices * Form::kForm.matrices;
  const int64_t in_columns = d.input_columns(), panel_columns = d.panel_columns();
  float* const transformed = scratch + kIn * in_columns;
  float* const products = transformed + d.values(in_columns);
  std::fill(scratch, transformed, 0.0f);
  const T* const zeros = reinterpret_cast<const T*>(scratch);
  const int64_t all_tiles = (end - begin) * d.tile_columns, panels = (last - first + kWideBlocks - 1) / kWideBlocks;
  const int64_t calls = all_tiles * (in_columns / kBlock + last - first) * kLinesPerTile<Form> +
                        Tiles<Form>(d, begin * d.tile_columns, end * d.tile_columns).all_rows() / kWideTiles * panels * d.channels;
  RunsAhead ahead(d.upcoming, d.upcoming_count, calls);
  MadeRows made;
  InputRows<T> input(d.x, d.source, d.channels, d.height, d.width, kIn, products + d.values(panel_columns), made, d.own);
  const T* lines[kIn];
  int64_t row_of_lines = -1;   // of tiles
  T* const y = static_cast<T*>(d.y);
  UnitMoments moments(d, scratch + d.scratch_floats() - d.moments_floats());
  int64_t outputs = 0;   // of a channel
  const int64_t blocks = WinogradConv::blocks(d.out_channels), last_tile = end * d.tile_columns, block_floats = d.channels * kBlock;

  for (int64_t from_tile = begin * d.tile_columns; from_tile < last_tile; from_tile += d.tiles) {
    const int64_t count = std::min(d.tiles, last_tile - from_tile);
    const Tiles<Form> tiles(d, from_tile, from_tile + count);
    const Places<Form> in_places(d, tiles, in_columns), out_places(d, tiles, panel_columns);
    int64_t next_of[kTileKinds];
    const auto begin_tiles = [&] {
      for (int kind = 0; kind < kTileKinds; ++kind) next_of[kind] = tiles.first(kind);
    };
    begin_tiles();
    for (TileCounter at(from_tile, d); at.tile < from_tile + count; at.next()) {
      const TileKind kind = tiles.kind(at);
      const int64_t t = next_of[kind]++, w = at.column * Form::kForm.in_step + d.in_left;
      if (at.row != row_of_lines) {
        row_of_lines = at.row;
        const int64_t top = at.row_of_image * Form::kForm.in_step + d.in_top;
        input.make(at.image, top, top + kIn - 1);
        for (int64_t i = 0; i < kIn; ++i) lines[i] = input(at.image, top + i);
      }
      const auto take = [&](auto transform) BNFAST_INLINE_LAMBDA {
        float* to = transformed + t * in_columns;
        int64_t c = 0;
        for (; c + kBlock <= d.channels; c += kBlock) {
          ahead.template lines<kLinesPerTile<Form>>();
          transform(c, Whole{}, to + c);
        }
        if (c < d.channels) transform(c, First{d.channels - c}, to + c);
      };
      EdgePlaces<const T, kIn> from = {{{}, d.channels}, -w, d.width - w};
      for (int i = 0; i < kIn; ++i) from.row[i] = lines[i] ? lines[i] + w * d.channels : zeros;
      if (kind != kWhole) {
        take([&](int64_t c, auto lanes, float* to) BNFAST_INLINE_LAMBDA {
          input_short_tile(tiles, kind, from, c, lanes, to, in_columns, in_places);
        });
      } else if (from.has(0) && from.has(kIn - 1)) {
        const TilePlaces<const T, kIn>& all = from;
        take([&](int64_t c, auto lanes, float* to) BNFAST_INLINE_LAMBDA { input_tile(all, c, lanes, to, in_places); });
      } else {
        take([&](int64_t c, auto lanes, float* to) BNFAST_INLINE_LAMBDA { input_tile(from, c, lanes, to, in_places); });
      }
    }
    for (int64_t block = first; block < last; block += d.panel) {
      const int64_t width = std::min(d.panel, last - block);
      for (int matrix = 0; matrix < kMatrices; ++matrix) {
        const float* v = transformed + in_places.matrix(matrix);
        const float* weights = d.weights + (matrix * blocks + block) * block_floats;
        const float* next_matrix = matrix + 1 < kMatrices
                                       ? weights + blocks * block_floats
                                       : d.weights + (block + width < last ? block + width : first) * block_floats;
        float* m = products + out_places.matrix(matrix);
        const int64_t rows = (in_places.rows(matrix) + kWinogradRowGroup - 1) / kWinogradRowGroup * kWinogradRowGroup;
        int64_t b = 0;
        for (; b + kWideBlocks <= width; b += kWideBlocks) {
          const float* next = b + kWideBlocks < width ? weights + (b + kWideBlocks) * block_floats : next_matrix;
          multiply_panel<kWideBlocks>(d, v, weights + b * block_floats, next, rows, m + b * kBlock, ahead);
        }
        if (b < width) multiply_panel<1>(d, v, weights + b * block_floats, next_matrix, rows, m + b * kBlock, ahead);
      }
      begin_tiles();
      for (TileCounter at(from_tile, d); at.tile < from_tile + count; at.next()) {
        const TileKind kind = tiles.kind(at);
        const int64_t t = next_of[kind]++, h = at.row_of_image * kOut + d.out_top, w = at.column * kOut + d.out_left;
        const int64_t corner = ((at.image * d.out_height + h) * d.out_width + w) * d.out_channels, line = d.out_width * d.out_channels;
        const int64_t first_down = std::max<int64_t>(0, -h), first_across = std::max<int64_t>(0, -w);
        const int64_t here = (tiles.down(kind) - first_down) * (tiles.across(kind) - first_across);
        if (block == first) outputs += here;
        const auto give = [&](auto transform) BNFAST_INLINE_LAMBDA {
          for (int64_t b = 0; b < width; ++b) {
            const int64_t k = (block + b) * kBlock;
            const FloatBlock bias = d.bias ? load_block(d.bias + k) : FloatBlock(0);
            ahead.template lines<kLinesPerTile<Form>>();
            const float* m = products + t * panel_columns + b * kBlock;
            // The first tile of a unit twice: for the centre, then for the sums.
            for (int pass = moments && at.tile == begin * d.tile_columns ? 0 : 1; pass < 2; ++pass) {
              TileSums sums = moments.tile(k);
              if (k + kBlock <= d.out_channels) transform(m, bias, k, Whole{}, sums);
              else transform(m, bias, k, First{d.out_channels - k}, sums);
              if (pass == 0) moments.set_centre(sums, k, here);
              else moments.add(sums, k);
            }
          }
        };
        TilePlaces<T, kOut> to = {{}, d.out_channels};
        for (int i = 0; i < kOut; ++i) to.row[i] = y + corner + i * line;
        if (kind == kWhole && h >= 0 && w >= 0) {
          give([&](const float* m, const FloatBlock& bias, int64_t k, auto lanes, TileSums& sums) BNFAST_INLINE_LAMBDA {
            output_tile(m, out_places, bias, to, k, lanes, sums);
          });
        } else {
          give([&](const float* m, const FloatBlock& bias, int64_t k, auto lanes, TileSums& sums) BNFAST_INLINE_LAMBDA {
            output_short_tile(tiles, kind, m, panel_columns, out_places, bias, to, first_down, first_across, k, lanes, sums);
          });
        }
      }
    }
  }
  input.finish();
  moments.finish(first * kBlock, std::min(last * kBlock, d.out_channels), outputs);
}

template <class T>
constexpr WinogradKernels winograd_kernels() {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
    // Wide tiles save products where products are the most of the work: in bfloat16 the direct form serves there.
    WinogradKernels::TileRows wide = nullptr, blocked = nullptr;
    if constexpr (std::is_same_v<T, float>) wide = winograd_tile_rows<Wide, T>, blocked = winograd_tile_rows<Blocked, T>;
    return {winograd_tile_rows<Same, T>, wide, blocked, winograd_tile_rows<Halved, T>, winograd_tile_rows<Doubled, T>};
  } else {
    return {};
  }
}

}  // namespace bnfast::BNFAST_NAMESPACE
