// A group's beginning and end, its heap, its counters; the collectives are in shm_reduce.cpp and shm_move.cpp.
#include <pthread.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "shm_inside.hpp"

namespace shoal {
namespace {

std::atomic<std::uint64_t> forks{0};  // of which this process is the child

std::uint64_t forks_here() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}

Layout checked(int rank, int world, const std::vector<int>& pidfds, const Options& options) {
  if (world < 1 || world > ShmGroup::kMostRanks) {
    throw std::invalid_argument("a group has 1 to " + std::to_string(ShmGroup::kMostRanks) + " ranks, not " +
                                std::to_string(world));
  }
  if (rank < 0 || rank >= world) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(world));
  }
  if (!pidfds.empty() && static_cast<int>(pidfds.size()) != world) {
    throw std::invalid_argument(std::to_string(pidfds.size()) + " process descriptors for " + std::to_string(world) +
                                " ranks");
  }
  if (!options.names.empty() && static_cast<int>(options.names.size()) != world) {
    throw std::invalid_argument(std::to_string(options.names.size()) + " names for " + std::to_string(world) + " ranks");
  }
  return Layout(world, options);
}

}  // namespace

ShmGroup::Inside::Inside(int memfd, int rank_, int world_, const std::vector<int>& pidfds, const Options& options_)
    : options(options_), rank(rank_), world(world_),
      segment(memfd, rank_, checked(rank_, world_, pidfds, options_), options_.mapping, options_.arenas),
      waiter(segment, spin_for(world_, options_.usable_cores), options_.asleep), arena(segment), fork_generation(forks_here()),
      timeout_s(options_.timeout_s), watch(pidfds, [this](int r) {
        if (r == rank || segment.control(r).member.joined.load() == 2) return;  // left in good order
        abort(Failure::dead_peer, position_of(r) + " died");
      }) {
  for (Count& count : counts) count.waiting_s = std::vector<std::atomic<double>>(world);
}

ShmGroup::Inside::~Inside() {
  watch.stop(forked());
  if (forked() || !joined) return;
  segment.control(rank).member.joined.store(2);
  waiter.ring_all();
}

std::string ShmGroup::Inside::called(int r) const {
  return "rank " + std::to_string(options.names.empty() ? r : options.names[r]);
}

bool ShmGroup::Inside::forked() const { return forks.load(std::memory_order_relaxed) != fork_generation; }

void ShmGroup::Inside::join() {
  const std::uint64_t digest = segment.layout().digest();
  std::uint64_t said = 0;
  if (!segment.header().layout.compare_exchange_strong(said, digest) && said != digest) {
    const std::string why = called(rank) + " of group '" + options.name +
                            "' was made with another world size, slot_bytes or arena_bytes than the others";
    abort(Failure::mismatch, why);
    throw Failure(Failure::mismatch, why);
  }
  Member& self = segment.control(rank).member;
  self.pid.store(static_cast<std::uint32_t>(getpid()), std::memory_order_relaxed);
  self.mapped.store(segment.mapped(), std::memory_order_relaxed);
  if (self.joined.exchange(1) != 0) {
    throw std::invalid_argument(called(rank) + " of group '" + options.name +
                                "' exists already: every rank once, and a new memory file for every group");
  }
  joined = true;
  Call(*this, signature_for(Op::barrier, DType::raw, 0), 0, options.timeout_s).open();
  for (Count& count : counts) count.calls.store(0), count.moving_s.store(0);
  for (auto& seconds : counts[static_cast<int>(Op::barrier)].waiting_s) seconds.store(0);
  arena_room = segment.mapped();
  for (int r = 0; r < world; ++r) {
    const std::size_t there = segment.control(r).member.mapped.load(std::memory_order_relaxed);
    arena_room = there < arena_room ? there : arena_room;
  }
}

void ShmGroup::Inside::abort(Failure::Kind kind, const std::string& why) {
  Header& header = segment.header();
  std::uint32_t living = 0;
  // The first cause is the one to report; but who reported it may have gone before it rang.
  if (!header.aborted.compare_exchange_strong(living, 1)) return waiter.ring_all();
  header.abort_kind.store(kind);
  header.text_length = static_cast<std::int32_t>(why.size() < sizeof header.text ? why.size() : sizeof header.text);
  std::memcpy(header.text, why.data(), header.text_length);
  header.aborted.store(2);
  waiter.ring_all();
}

std::string ShmGroup::Inside::abort_text() const {
  const Header& header = segment.header();
  if (!header.aborted.load()) return "";
  // Whoever writes the reason needs a moment; should it die in that moment, there is none.
  const Clock::time_point limit = Clock::now() + std::chrono::milliseconds(20);
  while (header.aborted.load() != 2 && Clock::now() < limit) std::this_thread::yield();
  return header.aborted.load() == 2 ? std::string(header.text, header.text_length) : "the group was aborted";
}

std::string ShmGroup::Inside::position_of(int r) const {
  const Control& control = segment.control(r);
  const std::uint64_t even = control.progress[0].at.load(), odd = control.progress[1].at.load();
  const std::uint64_t at = even > odd ? even : odd;
  const std::uint32_t pid = control.member.pid.load();
  std::string text = called(r) + " (";
  if (pid) text += "pid " + std::to_string(pid) + ", ";
  if (!at) return text + (pid ? "joining)" : "never joined)");
  if (sequence_of(at) == 0) return text + "has joined, but entered no operation)";
  return text + "last in operation " + std::to_string(sequence_of(at)) + ", " + name_of(op_of(at)) + ", step " +
         std::to_string(step_of(at)) + ")";
}

std::size_t ShmGroup::reserved_bytes(int world, const Options& options) { return Layout(world, options).arena_offset; }
std::size_t ShmGroup::total_bytes(int world, const Options& options) { return Layout(world, options).total_bytes; }

ShmGroup::ShmGroup(int memfd, int rank, int world, const std::vector<int>& pidfds, const Options& options)
    : inside_(std::make_unique<Inside>(memfd, rank, world, pidfds, options)) {
  inside_->join();
}
ShmGroup::~ShmGroup() = default;

int ShmGroup::rank() const { return inside_->rank; }
int ShmGroup::world() const { return inside_->world; }
const std::string& ShmGroup::name() const { return inside_->options.name; }

void ShmGroup::say(std::uint64_t words) { inside_->words = words; }

void* ShmGroup::allocate(std::size_t bytes) { return inside_->arena.allocate(bytes, inside_->arena_room); }
void ShmGroup::release(void* memory) {
  if (!inside_->arena.release(memory)) throw std::invalid_argument("release of memory that allocate did not return");
}
bool ShmGroup::owns(const void* memory) const { return inside_->segment.offset_of(memory, 1) != 0; }
std::size_t ShmGroup::arena_room() const { return inside_->arena_room; }

void ShmGroup::abort(const std::string& why) { inside_->abort(Failure::aborted, why); }
std::string ShmGroup::why_aborted() const { return inside_->abort_text(); }
void ShmGroup::set_timeout(double timeout_s) { inside_->timeout_s.store(timeout_s); }

OpCounters ShmGroup::counters(Op op) const {
  const Inside::Count& count = inside_->counts[static_cast<int>(op)];
  OpCounters counters;
  counters.calls = count.calls.load(std::memory_order_relaxed);
  counters.bytes = count.bytes.load(std::memory_order_relaxed);
  counters.zero_copy_calls = count.zero_copy_calls.load(std::memory_order_relaxed);
  counters.moving_s = count.moving_s.load(std::memory_order_relaxed);
  for (const auto& seconds : count.waiting_s) counters.waiting_s.push_back(seconds.load(std::memory_order_relaxed));
  return counters;
}

std::vector<Position> ShmGroup::positions() const {
  std::vector<Position> positions;
  for (int r = 0; r < inside_->world; ++r) {
    const Control& control = inside_->segment.control(r);
    const std::uint64_t even = control.progress[0].at.load(), odd = control.progress[1].at.load();
    const std::uint64_t at = even > odd ? even : odd;
    positions.push_back({sequence_of(at), op_of(at), step_of(at), static_cast<int>(control.member.pid.load()),
                         control.member.joined.load() == 2});
  }
  return positions;
}

void ShmGroup::barrier(double timeout_s) {
  Call(*inside_, signature_for(Op::barrier, DType::raw, 0), 0, timeout_s).open();
}

}  // namespace shoal
