// Numbers of 16 bits on the CPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "similarity.h"

namespace gapkernels {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// float16 by the compiler's own type, bfloat16 as the upper half of a float32, rounded to nearest even.
inline float load(const void* data, int64_t index, Element element) {
  if (element == Element::kFloat16) return static_cast<float>(static_cast<const _Float16*>(data)[index]);
  return bits_to_float(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16);
}

inline void store(void* data, int64_t index, Element element, float value) {
  if (element == Element::kFloat16) {
    static_cast<_Float16*>(data)[index] = static_cast<_Float16>(value);
  } else {
    const uint32_t bits = float_to_bits(value);
    const uint16_t rounded = value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    static_cast<uint16_t*>(data)[index] = rounded;
  }
}

}  // namespace gapkernels
