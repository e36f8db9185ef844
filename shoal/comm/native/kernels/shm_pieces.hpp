// Cutting buffers: into pieces that fit the slots, and into a part for each rank. Pure arithmetic, in bytes.
#pragma once

#include <cstddef>
#include <cstring>

#include "shm_segment.hpp"

namespace shoal {

struct Range {
  std::size_t begin, end;
  std::size_t size() const { return end - begin; }
};

inline std::size_t up_to_line(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Part `index` of `parts` about equal ones, cut at multiples of the line; the last ones may be short or empty.
inline Range part_of(Range whole, int index, int parts) {
  const std::size_t each = up_to_line((whole.size() + parts - 1) / parts);
  const std::size_t begin = index * each < whole.size() ? index * each : whole.size();
  const std::size_t end = begin + each < whole.size() ? begin + each : whole.size();
  return {whole.begin + begin, whole.begin + end};
}

// `bytes` in pieces of at most `most` (a multiple of the line), all about equal.
struct Pieces {
  Pieces(std::size_t bytes_, std::size_t most) : bytes(bytes_), count((bytes_ + most - 1) / most) {
    each = count ? up_to_line((bytes + count - 1) / count) : 0;
    if (each) count = (bytes + each - 1) / each;
  }
  Range operator[](std::size_t index) const {  // empty beyond the end
    const std::size_t begin = index * each < bytes ? index * each : bytes;
    return {begin, begin + each < bytes ? begin + each : bytes};
  }
  std::size_t bytes, count, each = 0;
};

// Rounded down to lines, but one at least.
inline std::size_t lines_in(std::size_t bytes) { return bytes < kLine ? kLine : bytes / kLine * kLine; }

inline void copy(void* to, const void* from, std::size_t bytes) {
  if (bytes && to != from) std::memcpy(to, from, bytes);
}

}  // namespace shoal
