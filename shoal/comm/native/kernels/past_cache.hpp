// Stores that do not go through the cache: no line is fetched in order to be overwritten, and none is driven out.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Copies runs of memory that do not overlap. `past_cache_done` comes after the last one, before anybody is told.
inline void copy_past_cache(void* into, const void* from, std::size_t bytes) {
#if defined(__SSE2__)
  auto* to = static_cast<char*>(into);
  const auto* source = static_cast<const char*>(from);
  const std::size_t past = reinterpret_cast<std::uintptr_t>(to) % 64;
  const std::size_t head = past ? (64 - past < bytes ? 64 - past : bytes) : 0;
  std::memcpy(to, source, head);
  to += head, source += head, bytes -= head;
  for (; bytes >= 64; to += 64, source += 64, bytes -= 64)
    for (int part = 0; part < 64; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + part),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + part)));
  std::memcpy(to, source, bytes);
#else
  std::memcpy(into, from, bytes);
#endif
}

inline void past_cache_done() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
