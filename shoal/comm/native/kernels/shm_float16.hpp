// Blocks of 16-bit floats to f32 and back, by the machine's own instructions where it has them, with the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shoal {

void widen_f16(float* out, const std::uint16_t* in, std::size_t count);
void narrow_f16(std::uint16_t* out, const float* in, std::size_t count);  // to nearest, ties to even
void widen_f16_portable(float* out, const std::uint16_t* in, std::size_t count);
void narrow_f16_portable(std::uint16_t* out, const float* in, std::size_t count);

}  // namespace shoal
