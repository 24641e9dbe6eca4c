// What can stand in the way of a launch, found out before it. Plain C++: the tests on the CPU run the same code.
#pragma once

#include <cstddef>
#include <cstdio>

namespace gapkernels {

constexpr int kOldestDriver = 12010;  // arguments of more than 4 KiB

// Why a driver for this version of CUDA (1000·major + 10·minor, 0 for none) is not enough; null if it is. The text is
// valid until the same thread asks again.
inline const char* driver_problem(int version) {
  if (version == 0) return "there is no NVIDIA driver";
  if (version >= kOldestDriver) return nullptr;
  static thread_local char text[96];
  std::snprintf(text, sizeof(text), "the driver is for CUDA %d.%d, the kernels need one for 12.1 or newer",
                version / 1000, version % 1000 / 10);
  return text;
}

// Whether the driver filled a copy descriptor. CUTLASS hands out zeros where it refused to: its assertion is compiled
// away, and a kernel with such a descriptor ends in an illegal access or in copies of nothing.
inline bool is_encoded(const void* descriptor, size_t bytes) {
  const auto* values = static_cast<const unsigned char*>(descriptor);
  for (size_t i = 0; i < bytes; ++i) {
    if (values[i] != 0) return true;
  }
  return false;
}

}  // namespace gapkernels
