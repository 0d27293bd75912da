// Storage formats of 16 bits; the torch types have the same layout.
#pragma once

#include <cstdint>

namespace bnfast {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

}  // namespace bnfast
