// The compressors' kernels on numbers of every kind and on damaged payloads, for the sanitizers: nothing may be read or
// written outside of what the sizes say.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using Bytes = std::vector<std::uint8_t>;

extern "C" {
void shoal_bf16_compress(const float*, float*, std::uint16_t*, std::int64_t);
void shoal_bf16_add(const std::uint16_t*, float*, std::int64_t);
void shoal_bf16_restore(const std::uint16_t*, float*, std::int64_t);
void shoal_fp16_compress(const float*, float*, std::uint16_t*, std::int64_t);
void shoal_fp16_add(const std::uint16_t*, float*, std::int64_t);
void shoal_fp16_restore(const std::uint16_t*, float*, std::int64_t);
void shoal_int8_compress(const float*, float*, std::uint8_t*, std::int64_t);
void shoal_int8_add(const std::uint8_t*, float*, std::int64_t);
void shoal_int8_restore(const std::uint8_t*, float*, std::int64_t);
void shoal_onebit_compress(const float*, float*, std::uint8_t*, std::int64_t);
void shoal_onebit_add(const std::uint8_t*, float*, std::int64_t);
void shoal_onebit_restore(const std::uint8_t*, float*, std::int64_t);
std::int32_t shoal_topk_compress(const float*, float*, std::uint8_t*, std::int64_t, std::int64_t, std::int64_t,
                                 std::int64_t, std::int64_t);
std::int32_t shoal_topk_add(const std::uint8_t*, float*, std::int64_t, std::int64_t);
}

namespace {
float any_number(int round) {
  if (round % 2 == 0) return static_cast<float>(std::rand() % 1000 - 500);
  const std::uint32_t word = static_cast<std::uint32_t>(std::rand()) * 2654435761u;  // NaN, infinite, subnormal, ...
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

bool topk(const float* gradient, float* error, float* into, std::int64_t n) {
  const std::int64_t room = n / 100 + 1, samples = n <= 4096 ? n : 4096, expected = room * samples / n;
  Bytes body(8 + 8 * room);
  if (shoal_topk_compress(gradient, error, body.data(), n, room, samples, n / samples, expected ? expected : 1)) {
    return false;
  }
  if (shoal_topk_add(body.data(), into, n, room)) return false;
  for (int damage = 0; damage < 20; ++damage) {
    body[std::rand() % body.size()] = static_cast<std::uint8_t>(std::rand());
    shoal_topk_add(body.data(), into, n, room);  // refused or not: it stays inside
  }
  return true;
}

bool every_kernel(std::int64_t n, int round) {
  std::vector<float> gradient(n), kept(n), into(n);
  for (float& value : gradient) value = any_number(round);
  float* error = round % 3 ? kept.data() : nullptr;
  std::vector<std::uint16_t> halves(n);
  shoal_bf16_compress(gradient.data(), error, halves.data(), n);
  shoal_bf16_add(halves.data(), into.data(), n);
  shoal_bf16_restore(halves.data(), into.data(), n);
  shoal_fp16_compress(gradient.data(), error, halves.data(), n);
  shoal_fp16_add(halves.data(), into.data(), n);
  shoal_fp16_restore(halves.data(), into.data(), n);
  const std::int64_t blocks = (n + 2047) / 2048;
  Bytes numbers(4 * blocks + n), signs(260 * blocks);
  shoal_int8_compress(gradient.data(), error, numbers.data(), n);
  shoal_int8_add(numbers.data(), into.data(), n);
  shoal_int8_restore(numbers.data(), into.data(), n);
  shoal_onebit_compress(gradient.data(), error, signs.data(), n);
  shoal_onebit_add(signs.data(), into.data(), n);
  shoal_onebit_restore(signs.data(), into.data(), n);
  return topk(gradient.data(), error, into.data(), n);
}
}  // namespace

int main() {
  for (int round = 0; round < 40; ++round) {
    for (const std::int64_t n : {1, 7, 63, 64, 2047, 2048, 2049, 5000, 70001}) {
      if (!every_kernel(n, round)) return 1;
    }
  }
  std::puts("ok");
}
