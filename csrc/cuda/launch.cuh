// From a dtype and a layout at run time to the kernel that is made for them.
#pragma once

#include <type_traits>

#include "slots.cuh"

namespace bnfast::cuda {

template <class T> struct Type { using type = T; };

// Calls f(Type<element>, is columns) and returns its value.
template <class F>
int with_types(DType dtype, const View& view, F f) {
  const auto with_layout = [&](auto type) -> int {
    return view.columns ? f(type, std::true_type{}) : f(type, std::false_type{});
  };
  switch (dtype) {
    case DType::kFloat: return with_layout(Type<float>{});
    case DType::kDouble: return with_layout(Type<double>{});
    case DType::kBFloat16: return with_layout(Type<BFloat16>{});
    case DType::kHalf: return with_layout(Type<Half>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace bnfast::cuda
