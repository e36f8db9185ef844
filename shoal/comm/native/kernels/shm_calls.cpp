// The group and its channels as plain C functions, for callers without torch's extension: what Python calls by ctypes.
//
// Every function that can fail returns 0, or 1 + Failure::Kind (kInvalid for a wrong argument); shoal_ranks_error() is
// the line of the calling thread's last failure.
#include "shm_channel.hpp"

#define SHOAL_EXPORT extern "C" __attribute__((visibility("default")))

using shoal::Channels;
using shoal::DType;
using shoal::Failure;
using shoal::Options;
using shoal::ReduceOp;
using shoal::ShmGroup;

namespace {

constexpr int kInvalid = 100;
thread_local std::string last_error;

struct Ranks {
  Ranks(void* memory, int rank, int world, const Options& options, std::size_t room)
      : group(-1, rank, world, {}, options),
        channels(group.inside(), static_cast<char*>(memory) + ShmGroup::reserved_bytes(world, options), room) {}
  ShmGroup group;
  Channels channels;
};

template <typename Work>
int tried(const Work& work) {
  try {
    work();
    return 0;
  } catch (const Failure& failure) {
    last_error = failure.what();
    return 1 + failure.kind;
  } catch (const std::exception& error) {
    last_error = error.what();
    return kInvalid;
  }
}

// words: a digest of what the caller says that it does, which must be equal on all ranks.
template <typename Work>
int agreed(Ranks* ranks, std::uint64_t words, const Work& work) {
  ranks->group.say(words);
  return tried(work);
}

Options without_arena() {
  Options options;
  options.arena_bytes = 0;
  return options;
}

}  // namespace

SHOAL_EXPORT const char* shoal_ranks_error() { return last_error.c_str(); }

// Bytes that a group and its channels need: zero at first, the same memory for all ranks. room: bytes of a ring.
SHOAL_EXPORT std::size_t shoal_ranks_bytes(int world, std::size_t room) {
  return ShmGroup::reserved_bytes(world, without_arena()) + Channels::bytes(world, room);
}

// names: what the ranks are called in messages. arenas: null, or where each rank's memory of arena_bytes begins here,
// which all ranks can read and write.
// asleep: see Options. Returns null where it fails.
SHOAL_EXPORT void* shoal_ranks_open(void* memory, int rank, int world, const char* name, const int* names,
                                    int usable_cores, std::size_t room, char* const* arenas, std::size_t arena_bytes,
                                    int (*asleep)(int)) {
  Ranks* made = nullptr;
  tried([&] {
    Options options = without_arena();
    options.name = name;
    options.names.assign(names, names + world);
    options.timeout_s = 1e9;  // whoever started the ranks watches them
    options.usable_cores = usable_cores;
    options.mapping = memory;
    if (arenas) options.arenas.assign(arenas, arenas + world), options.arena_bytes = arena_bytes;
    options.asleep = [asleep](int whom) { return asleep(whom) != 0; };
    made = new Ranks(memory, rank, world, options, room);
  });
  return made;
}

// After its last call has returned; the others may still be in theirs.
SHOAL_EXPORT void shoal_ranks_close(Ranks* ranks) { delete ranks; }

SHOAL_EXPORT int shoal_ranks_barrier(Ranks* ranks, std::uint64_t words) {
  return agreed(ranks, words, [&] { ranks->group.barrier(); });
}

// Counts are in elements, dtypes in the order of DType; sums are in the order of ranks.
SHOAL_EXPORT int shoal_ranks_all_reduce(Ranks* ranks, std::uint64_t words, const void* in, void* out,
                                        std::size_t count, int dtype) {
  const auto type = static_cast<DType>(dtype);
  return agreed(ranks, words, [&] { ranks->group.all_reduce(in, out, count, type, ReduceOp::sum); });
}

SHOAL_EXPORT int shoal_ranks_all_gather(Ranks* ranks, std::uint64_t words, const void* in, void* const* outs,
                                        const std::size_t* counts, int dtype) {
  return agreed(ranks, words, [&] { ranks->group.all_gather(in, outs, counts, static_cast<DType>(dtype)); });
}

SHOAL_EXPORT int shoal_ranks_reduce_scatter(Ranks* ranks, std::uint64_t words, const void* const* ins, void* out,
                                            const std::size_t* counts, int dtype) {
  const auto type = static_cast<DType>(dtype);
  return agreed(ranks, words, [&] { ranks->group.reduce_scatter(ins, out, counts, type, ReduceOp::sum); });
}

SHOAL_EXPORT int shoal_ranks_all_to_all(Ranks* ranks, std::uint64_t words, const void* const* ins,
                                        const std::size_t* sends, void* const* outs, const std::size_t* receives,
                                        int dtype) {
  const auto type = static_cast<DType>(dtype);
  return agreed(ranks, words, [&] { ranks->group.all_to_all(ins, sends, outs, receives, type); });
}

SHOAL_EXPORT int shoal_ranks_broadcast(Ranks* ranks, std::uint64_t words, void* data, std::size_t count, int dtype,
                                       int root) {
  return agreed(ranks, words, [&] { ranks->group.broadcast(data, count, static_cast<DType>(dtype), root); });
}

// head: Channels::kHead bytes, the first 8 of which are `bytes`.
SHOAL_EXPORT int shoal_ranks_send(Ranks* ranks, const void* head, const void* data, std::size_t bytes, int to) {
  return tried([&] { ranks->channels.send(head, data, bytes, to); });
}

// -1: another head came, now in `came`; its data has gone by.
SHOAL_EXPORT int shoal_ranks_receive(Ranks* ranks, const void* head, void* data, std::size_t bytes, int from,
                                     void* came) {
  bool expected = true;
  const int failed = tried([&] { expected = ranks->channels.receive(head, data, bytes, from, came); });
  return failed ? failed : expected ? 0 : -1;
}

SHOAL_EXPORT unsigned long long shoal_ranks_in_place(Ranks* ranks) {  // calls that moved nothing twice
  unsigned long long calls = 0;
  for (int op = 0; op < shoal::kOps; ++op) calls += ranks->group.counters(static_cast<shoal::Op>(op)).zero_copy_calls;
  return calls;
}
