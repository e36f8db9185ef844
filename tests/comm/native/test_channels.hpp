// Messages between two ranks arrive whole and in order, however small the ring, and no wait for one outlives its cause.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>

#include "shm_channel.hpp"
#include "shm_ranks.hpp"

using namespace shoal;

constexpr std::size_t kRoom = 4 << 10;  // of a ring: most messages below are longer, or end beyond its end

using Channeled = std::function<void(ShmGroup&, Channels&, int)>;
using Looked = std::function<void(const char*, std::size_t)>;

// after: looks at all memory of the channels when all ranks have ended.
inline void on_channels(int world, const Options& options, const Channeled& work, const Looked& after = nullptr) {
  const std::size_t bytes = Channels::bytes(world, kRoom);
  void* memory = std::aligned_alloc(kLine, bytes);
  std::memset(memory, 0, bytes);
  on_ranks(world, options, [&](ShmGroup& group, int rank) {
    Channels channels(group.inside(), memory, kRoom);
    work(group, channels, rank);
  });
  if (after) after(static_cast<const char*>(memory), bytes);
  std::free(memory);
}

struct Message {  // its bytes follow from who sends which
  Message(int from, int to, std::size_t number, std::size_t bytes) : data(bytes) {
    const std::uint64_t words[4] = {bytes, static_cast<std::uint64_t>(from), static_cast<std::uint64_t>(to), number};
    std::memcpy(head, words, sizeof words);
    for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<char>(i * 7 + from * 31 + to * 57 + number * 101);
  }
  alignas(std::uint64_t) char head[Channels::kHead] = {};
  std::vector<char> data;
};

inline void pass_on(Channels& channels, const Message& message, int from, int to, int rank) {
  if (rank == from) channels.send(message.head, message.data.data(), message.data.size(), to);
  if (rank != to) return;
  const std::size_t bytes = message.data.size();
  std::vector<char> found(bytes + 1, '\x5a');
  char came[Channels::kHead];
  CLAIM(channels.receive(message.head, found.data(), bytes, from, came), "another head from %d", from);
  const bool same = std::equal(message.data.begin(), message.data.end(), found.begin());
  CLAIM(same, "%zu bytes from %d are others", bytes, from);
  CLAIM(found[bytes] == '\x5a', "written beyond %zu bytes", bytes);
}

inline void messages_of_any_size_arrive_whole_and_in_order(int world) {
  constexpr std::size_t kHead = Channels::kHead;
  const std::vector<std::size_t> sizes = {0,         1,        kHead,         kRoom - kHead - 1, kRoom - kHead,
                                          kRoom - 1, kRoom,    kRoom + 1,     3 * kRoom + 5,     kRoom - kHead + 1,
                                          77,        0,        40 * kRoom + 3};
  on_channels(world, small_options(), [&](ShmGroup&, Channels& channels, int rank) {
    for (std::size_t number = 0; number < sizes.size(); ++number) {
      for (int from = 0; from < world; ++from) {
        for (int to = 0; to < world; ++to) {
          if (from != to) pass_on(channels, Message(from, to, number, sizes[number]), from, to, rank);
        }
      }
    }
  });
}

inline void no_more_memory_is_touched_than_was_ever_under_way() {
  const auto talk = [](ShmGroup&, Channels& channels, int rank) {
    for (std::size_t number = 0; number < 100; ++number) {
      pass_on(channels, Message(0, 1, number, 200), 0, 1, rank);
      pass_on(channels, Message(1, 0, number, 200), 1, 0, rank);  // so that the other ring has run empty
    }
  };
  on_channels(2, small_options(), talk, [](const char* memory, std::size_t bytes) {
    const auto touched = static_cast<std::size_t>(bytes - std::count(memory, memory + bytes, '\0'));
    CLAIM(touched < 2 * (Channels::kHead + 200) + 64, "%zu bytes", touched);
  });
}

inline void many_messages_are_under_way_at_once() {
  on_channels(3, small_options(), [](ShmGroup&, Channels& channels, int rank) {
    std::minstd_rand dice(5);  // the same on all ranks
    for (int round = 0; round < 60; ++round) {
      std::vector<std::size_t> sizes;
      std::size_t under_way = 0;
      while (under_way < kRoom / 2) {
        sizes.push_back(dice() % 600);
        under_way += Channels::kHead + sizes.back();
      }
      if (under_way > kRoom) sizes.pop_back();
      for (std::size_t number = 0; number < sizes.size(); ++number) {
        for (int to = 0; to < 3; ++to) {
          if (to != rank) pass_on(channels, Message(rank, to, number, sizes[number]), rank, to, rank);
        }
      }
      for (int from = 0; from < 3; ++from) {
        for (std::size_t number = 0; number < sizes.size() && from != rank; ++number) {
          pass_on(channels, Message(from, rank, number, sizes[number]), from, rank, rank);
        }
      }
    }
  });
}

inline void another_head_than_expected_is_told_and_writes_nothing() {
  on_channels(2, small_options(), [](ShmGroup&, Channels& channels, int rank) {
    for (const std::size_t bytes : {0ul, 100ul, 3 * kRoom}) {
      const Message sent(1, 0, 1, bytes), expected(1, 0, 2, 50), last(1, 0, 3, 20);
      if (rank == 1) channels.send(sent.head, sent.data.data(), bytes, 0);
      if (rank == 0) {
        std::vector<char> found(50, '\x5a');
        char came[Channels::kHead];
        CLAIM(!channels.receive(expected.head, found.data(), 50, 1, came), "took it for the expected one");
        CLAIM(!std::memcmp(came, sent.head, Channels::kHead), "another head was told");
        for (char x : found) CLAIM(x == '\x5a', "written");
      }
      pass_on(channels, last, 1, 0, rank);  // its bytes have gone by: the next message is the next one
    }
  });
}

inline void what_was_sent_comes_though_its_sender_has_left_and_then_nobody_waits() {
  Options options = small_options();
  options.names = {7, 4};
  std::atomic<bool> left{false};
  on_channels(2, options, [&](ShmGroup& group, Channels& channels, int rank) {
    const Message message(1, 0, 0, 1000);
    if (rank == 1) channels.send(message.head, message.data.data(), 1000, 0);
    if (rank == 0) {
      while (!group.positions()[1].left) std::this_thread::yield();
      pass_on(channels, message, 1, 0, rank);
      char came[Channels::kHead];
      const Failure none = failure_of([&] { channels.receive(message.head, nullptr, 0, 1, came); });
      claim_says(none, Failure::dead_peer, {"receive in group 'test', rank 7: rank 4 (pid", "has left the group"});
      const Message long_one(0, 1, 0, 2 * kRoom);
      const Failure full = failure_of([&] { channels.send(long_one.head, long_one.data.data(), 2 * kRoom, 1); });
      claim_says(full, Failure::dead_peer, {"send in group 'test', rank 7: rank 4 (pid", "has left the group"});
      left = true;
    }
  });
  CLAIM(left, "rank 0 went another way");
}

inline void a_peer_that_has_gone_is_as_good_as_one_that_left() {
  Options options = small_options();
  std::atomic<bool> gone{false}, raised{false};
  options.asleep = [&](int whom) { return whom < 0 || !gone; };
  on_channels(2, options, [&](ShmGroup&, Channels& channels, int rank) {
    char came[Channels::kHead] = {};
    if (rank == 1) {  // lives on, but the other is told that it does not
      gone = true;
      while (!raised) std::this_thread::yield();
      return;
    }
    claim_says(failure_of([&] { channels.receive(came, nullptr, 0, 1, came); }), Failure::dead_peer, {"rank 1 (pid"});
    raised = true;
  });
}

inline void abort_ends_the_wait_for_a_message_and_for_room() {
  on_channels(3, small_options(), [](ShmGroup& group, Channels& channels, int rank) {
    const Message message(0, 1, 0, 2 * kRoom);
    char came[Channels::kHead];
    const char* reason = "the user pressed a key";
    if (rank == 2) return group.abort(reason);
    if (rank == 0) {
      claim_says(failure_of([&] { channels.send(message.head, message.data.data(), 2 * kRoom, 1); }), Failure::aborted,
                 {"send in group 'test', rank 0", reason});
    } else {
      claim_says(failure_of([&] { channels.receive(message.head, nullptr, 0, 2, came); }), Failure::aborted,
                 {"receive in group 'test', rank 1", reason});
    }
  });
}

inline void test_channels() {
  for (int world : {2, 3, 5}) messages_of_any_size_arrive_whole_and_in_order(world);
  no_more_memory_is_touched_than_was_ever_under_way();
  many_messages_are_under_way_at_once();
  another_head_than_expected_is_told_and_writes_nothing();
  what_was_sent_comes_though_its_sender_has_left_and_then_nobody_waits();
  a_peer_that_has_gone_is_as_good_as_one_that_left();
  abort_ends_the_wait_for_a_message_and_for_room();
}
