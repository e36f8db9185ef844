// The life of one collective: entering, comparing what the ranks ask for, and saying what went wrong.
#include <cstdio>
#include <cstring>

#include "shm_inside.hpp"

namespace shoal {
namespace {

bool reduces(Op op) { return op == Op::all_reduce || op == Op::reduce || op == Op::reduce_scatter; }

std::string ranks_text(const std::vector<int>& ranks, const std::vector<int>& names) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(names.empty() ? ranks[i] : names[ranks[i]]);
  }
  return text;
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g s", seconds);
  return text;
}

std::string text_of(const Signature& s) {
  std::string text = name_of(s.op);
  if (s.op == Op::barrier) return text;
  text += "(";
  if (reduces(s.op)) text += std::string(name_of(s.reduce)) + ", ";
  text += name_of(s.dtype);
  if (s.op != Op::all_to_all) text += ", " + std::to_string(s.count) + (s.count == 1 ? " element" : " elements");
  if (s.shape) text += ", sizes " + std::to_string(s.shape % 65536);
  if (s.root >= 0) text += ", root " + std::to_string(s.root);
  if (s.words) text += ", in words " + std::to_string(s.words % 65536);
  return text + ")";
}

bool rooted(Op op) { return op == Op::reduce || op == Op::broadcast || op == Op::gather || op == Op::scatter; }

double total(const std::vector<std::atomic<double>>& seconds) {
  double sum = 0;
  for (const std::atomic<double>& s : seconds) sum += s.load(std::memory_order_relaxed);
  return sum;
}

}  // namespace

std::uint64_t digest_of(const std::size_t* counts, int world) {
  std::uint64_t digest = 0xcbf29ce484222325ull;
  bool even = true;
  for (int r = 0; r < world; ++r) {
    digest = (digest ^ counts[r]) * 0x100000001b3ull;
    digest ^= digest >> 29;
    even = even && counts[r] == counts[0];
  }
  return even ? 0 : digest | 1;
}

Call::Call(ShmGroup::Inside& inside_, Signature signature_, std::size_t bytes, double timeout_s)
    : inside(inside_), rank(inside_.rank), world(inside_.world), sequence(inside_.sequence + 1), signature(signature_),
      bytes_(bytes), timeout_s_(timeout_s > 0 ? timeout_s : inside_.timeout_s.load(std::memory_order_relaxed)),
      start_(Clock::now()), waited_(inside_.counts[static_cast<int>(signature_.op)].waiting_s) {
  // A longer wait than a year is none; it must not overflow the clock.
  const double most = 3.2e7;
  deadline_ = start_ + std::chrono::duration_cast<Clock::duration>(
                           std::chrono::duration<double>(timeout_s_ < most ? timeout_s_ : most));
  if (inside.forked()) {
    refuse(Failure::aborted, "this process was forked from the member; only the member may use the group");
  }
  if (inside.segment.header().aborted.load(std::memory_order_acquire)) fail(Waiter::Outcome::aborted, 0, -1);
  if (inside.busy.exchange(true, std::memory_order_acquire)) {
    refuse(Failure::refused, "another thread is within a collective of this group; they go one after the other");
  }
  inside.sequence = sequence;
  signature.words = inside.words;
  waited_before_ = total(waited_);
}

Call::~Call() {
  auto& count = inside.counts[static_cast<int>(signature.op)];
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  const double moving = seconds - (total(waited_) - waited_before_);
  count.calls.store(count.calls.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  count.bytes.store(count.bytes.load(std::memory_order_relaxed) + bytes_, std::memory_order_relaxed);
  count.moving_s.store(count.moving_s.load(std::memory_order_relaxed) + moving, std::memory_order_relaxed);
  inside.busy.store(false, std::memory_order_release);
}

void Call::zero_copy() const {
  auto& calls = inside.counts[static_cast<int>(signature.op)].zero_copy_calls;
  calls.store(calls.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

void Call::open() {
  inside.segment.progress(rank, sequence).signature = signature;
  inside.waiter.note_core();
  publish(1);
  wait(1);
  compare();
  // Each rank comes to the same conclusions from here, so all raise or none does.
  if (rooted(signature.op) && (signature.root < 0 || signature.root >= world)) {
    refuse(Failure::refused, "there is no rank " + std::to_string(signature.root) + " among " + std::to_string(world));
  }
  if (reduces(signature.op) && !can_reduce(signature.dtype, signature.reduce)) {
    refuse(Failure::refused, std::string(name_of(signature.reduce)) + " of " + name_of(signature.dtype) +
                                 " is not defined; use another operation, or convert first");
  }
}

bool Call::all(std::uint8_t flags) const {
  for (int r = 0; r < world; ++r) {
    if ((signature_of(r).flags & flags) != flags) return false;
  }
  return true;
}

void Call::compare() const {
  bool agree = true;
  for (int r = 0; r < world; ++r) agree = agree && signature.agrees(signature_of(r));
  if (agree) return;
  std::vector<bool> said(world, false);
  std::string text;
  for (int r = 0; r < world; ++r) {
    if (said[r]) continue;
    std::vector<int> same;
    for (int q = r; q < world; ++q) {
      if (!signature_of(q).agrees(signature_of(r))) continue;
      said[q] = true;
      same.push_back(q);
    }
    text += (text.empty() ? "" : "; ") + ranks_text(same, inside.options.names) +
            (same.size() == 1 ? " wants " : " want ") + text_of(signature_of(r));
  }
  refuse(Failure::mismatch, "collective mismatch, nothing was written: " + text);
}

void Call::compare_pairs() {
  std::string text;
  for (int from = 0; from < world; ++from) {
    for (int to = 0; to < world; ++to) {
      const std::uint64_t sent = table(from)[to], expected = table(to)[world + from];
      if (sent == expected || text.size() > 200) continue;
      text += (text.empty() ? "" : "; ") + inside.called(from) + " sends " + std::to_string(sent) +
              " elements to " + inside.called(to) + ", which expects " + std::to_string(expected);
    }
  }
  if (!text.empty()) refuse(Failure::mismatch, "collective mismatch, nothing was written: " + text);
}

std::string Call::described() const {
  return text_of(signature) + " of " + std::to_string(bytes_) + " bytes in group '" + inside.options.name + "', " +
         inside.called(rank) + ", operation " + std::to_string(sequence);
}

void Call::refuse(Failure::Kind kind, const std::string& why) const { throw Failure(kind, described() + ": " + why); }

void Call::fail(Waiter::Outcome outcome, std::uint64_t target, int whom) {
  if (outcome == Waiter::Outcome::aborted) {
    const std::string why = inside.abort_text();
    throw Failure(static_cast<Failure::Kind>(inside.segment.header().abort_kind.load()), described() + ": " + why);
  }
  std::string late;
  for (int r = 0; r < world; ++r) {
    if (r == rank || (whom >= 0 && r != whom) || inside.waiter.missing(target, r) < 0) continue;
    const bool left = inside.segment.control(r).member.joined.load() == 2;
    if (outcome == Waiter::Outcome::left && !left) continue;
    late += (late.empty() ? "" : "; ") + inside.position_of(r);
  }
  const bool left = outcome == Waiter::Outcome::left;
  const std::string why = left ? late + " has left the group"
                               : "timed out after " + seconds_text(timeout_s_) + " waiting for " + late;
  const Failure::Kind kind = left ? Failure::dead_peer : Failure::timeout;
  const std::string line = described() + ": " + why;
  inside.abort(kind, inside.called(rank) + " gave up in " + name_of(signature.op) + ", operation " +
                         std::to_string(sequence) + ": " + why);
  throw Failure(kind, line);
}

}  // namespace shoal
