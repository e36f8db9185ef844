// Every guard fires: on all ranks, with the right words, and no rank is left waiting.
#pragma once

#include <sys/wait.h>

#include <atomic>
#include <csignal>

#include "shm_ranks.hpp"

using namespace shoal;

// What a rank calls, with an input of ones and an output.
using Asked = std::function<void(ShmGroup&, float*, float*)>;

inline void disagreement_raises_on_all_ranks(const char* what, const Asked& first, const Asked& last,
                                             const std::vector<std::string>& said) {
  on_ranks(3, small_options(), [&](ShmGroup& group, int rank) {
    std::vector<float> in(60000, 1.0f), out(60000, -7.0f);
    const Failure failure = failure_of([&] { (rank == 2 ? last : first)(group, in.data(), out.data()); });
    const std::string own = "'test', rank " + std::to_string(rank);
    claim_says(failure, Failure::mismatch, {"ranks 0, 1 want ", "rank 2 wants ", own});
    claim_says(failure, Failure::mismatch, said);
    for (float x : in) CLAIM(x == 1, "%s: the input was written", what);
    for (float x : out) CLAIM(x == -7, "%s: the output was written", what);
    group.all_reduce(in.data(), out.data(), 3, DType::f32, ReduceOp::sum);  // nothing happened, so it goes on
    CLAIM(out[2] == 3, "%s: %f", what, static_cast<double>(out[2]));
  });
}

inline Asked all_reduce(std::size_t count, DType dtype = DType::f32, ReduceOp op = ReduceOp::sum) {
  return [=](ShmGroup& group, float* in, float* out) { group.all_reduce(in, out, count, dtype, op); };
}
inline Asked broadcast(std::size_t count, int root) {
  return [=](ShmGroup& group, float* in, float*) { group.broadcast(in, count, DType::f32, root); };
}
inline Asked uneven_gather(std::size_t a, std::size_t b, std::size_t c) {
  return [=](ShmGroup& group, float* in, float* out) {
    void* outs[3] = {out, out + a, out + a + b};
    const std::size_t counts[3] = {a, b, c};
    group.all_gather(in, outs, counts, DType::f32);
  };
}

inline void each_field_of_a_signature_is_compared() {
  for (std::size_t count : {100ul, 50000ul}) {  // one-shot, and in pieces
    const std::string n = std::to_string(count) + " elements";
    const Asked usual = all_reduce(count);
    const auto differs = [&](const char* what, const Asked& other, const std::vector<std::string>& said) {
      disagreement_raises_on_all_ranks(what, usual, other, said);
    };
    differs("dtype", all_reduce(count, DType::bf16), {"sum, float32, " + n, "sum, bfloat16, " + n});
    differs("op", all_reduce(count, DType::f32, ReduceOp::max), {"sum, float32", "max, float32"});
    differs("count", all_reduce(count + 1), {n, std::to_string(count + 1) + " elements"});
    differs("small and large", all_reduce(50001 - count), {n, std::to_string(50001 - count) + " element"});
    differs("operation", broadcast(count, 0), {"all_reduce(sum, float32, " + n, "broadcast(float32, " + n});
    const Asked other_words = [=](ShmGroup& group, float* in, float* out) {
      const struct Said {
        ShmGroup& group;
        ~Said() { group.say(0); }
      } said{group};
      group.say(70);
      all_reduce(count)(group, in, out);
    };
    differs("words", other_words, {n + ")", n + ", in words 70)"});
    differs("barrier", [](ShmGroup& group, float*, float*) { group.barrier(); }, {"wants barrier"});
    disagreement_raises_on_all_ranks("root", broadcast(count, 0), broadcast(count, 1), {"root 0", "root 1"});
    const Asked scatter = [=](ShmGroup& group, float* in, float* out) {
      group.reduce_scatter(in, out, count / 3, DType::f32, ReduceOp::sum);
    };
    const Asked gather = [=](ShmGroup& group, float* in, float* out) {
      group.all_gather(in, out, count / 3, DType::f32);
    };
    disagreement_raises_on_all_ranks("direction", gather, scatter, {"all_gather(", "reduce_scatter("});
    disagreement_raises_on_all_ranks("shares", uneven_gather(count / 2, count / 4, 1),
                                     uneven_gather(count / 4, count / 2, 1), {"sizes "});
  }
}

inline void all_to_all_compares_each_pair() {
  on_ranks(3, small_options(), [](ShmGroup& group, int rank) {
    std::vector<float> in(30), out(30, -7.0f);
    const void* ins[3] = {in.data(), in.data() + 10, in.data() + 20};
    void* outs[3] = {out.data(), out.data() + 10, out.data() + 20};
    const std::size_t sends[3] = {5, 5, 5}, receives[3] = {5, 5, rank == 1 ? 4ul : 5ul};
    const Failure failure = failure_of([&] { group.all_to_all(ins, sends, outs, receives, DType::f32); });
    claim_says(failure, Failure::mismatch, {"rank 2 sends 5 elements to rank 1, which expects 4"});
    for (float x : out) CLAIM(x == -7, "written");
  });
}

inline void what_is_not_defined_is_refused_by_all() {
  on_ranks(2, small_options(), [](ShmGroup& group, int) {
    std::vector<char> data(64);
    const auto refused = [&](const std::function<void()>& call, const char* words) {
      claim_says(failure_of(call), Failure::refused, {words});
    };
    refused([&] { group.all_reduce(data.data(), data.data(), 4, DType::i32, ReduceOp::avg); }, "avg of int32");
    refused([&] { group.all_reduce(data.data(), data.data(), 4, DType::f32, ReduceOp::bxor); }, "bxor of float32");
    refused([&] { group.all_reduce(data.data(), data.data(), 4, DType::c64, ReduceOp::max); }, "max of complex64");
    refused([&] { group.all_reduce(data.data(), data.data(), 4, DType::f8, ReduceOp::sum); }, "sum of float8");
    refused([&] { group.broadcast(data.data(), 4, DType::f32, 2); }, "no rank 2 among 2");
    group.barrier();
  });
}

inline void who_is_late_is_named_and_all_hear_of_it() {
  std::atomic<int> raised{0};
  on_ranks(3, small_options(), [&](ShmGroup& group, int rank) {
    float x = 1;
    group.all_reduce(&x, &x, 1, DType::f32, ReduceOp::sum);
    if (rank == 2) {
      while (raised.load() < 2) std::this_thread::yield();  // late: comes when the others have given up
    }
    const Failure failure = failure_of([&] { group.all_reduce(&x, &x, 1, DType::f32, ReduceOp::sum, 0.05); });
    raised.fetch_add(1);
    claim_says(failure, Failure::timeout, {"all_reduce(sum, float32, 1 element) of 4 bytes in group 'test'"});
    const std::string pid = std::to_string(getpid());
    claim_says(failure, Failure::timeout, {"operation 2", "rank 2 (pid " + pid + ", last in operation 1, all_reduce"});
    CLAIM(!group.why_aborted().empty(), "the group goes on");
    claim_says(failure_of([&] { group.barrier(); }), Failure::timeout, {"gave up"});
  });
}

inline void abort_wakes_whoever_sleeps() {
  on_ranks(3, small_options(), [](ShmGroup& group, int rank) {
    std::vector<float> data(50000);
    if (rank == 2) return group.abort("the user pressed a key");  // then leaves
    claim_says(failure_of([&] { group.all_reduce(data.data(), data.data(), data.size(), DType::f32, ReduceOp::sum); }),
               Failure::aborted, {"the user pressed a key"});
  });
}

inline void who_has_left_is_not_waited_for() {
  on_ranks(3, small_options(), [](ShmGroup& group, int rank) {
    group.barrier();
    if (rank == 1) return;
    claim_says(failure_of([&] { group.barrier(); }), Failure::dead_peer, {"rank 1 (pid", "has left the group"});
  });
}

inline void ranks_must_be_set_up_alike() {
  Options options = small_options();
  const Shared shared(2, options);
  Options other = shared.options();
  other.slot_bytes *= 2;
  std::vector<std::thread> threads;
  std::atomic<int> mismatches{0};
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      const Options& its = rank ? other : shared.options();
      const Failure failure = failure_of([&] { ShmGroup(shared.memfd(), rank, 2, {}, its); });
      mismatches += failure.kind == Failure::mismatch;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CLAIM(mismatches == 2, "%d", mismatches.load());
}

inline void a_rank_that_exists_already_is_refused_and_the_first_goes_on() {
  const Shared shared(1, small_options());
  ShmGroup first(shared.memfd(), 0, 1, {}, shared.options());
  bool refused = false;
  try {
    ShmGroup(shared.memfd(), 0, 1, {}, shared.options());
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("exists already") != std::string::npos;
  }
  CLAIM(refused && !first.positions()[0].left, "the second one hurt the first");
}

inline void the_arena_is_reused_and_has_an_end() {
  on_ranks(1, small_options(), [](ShmGroup& group, int) {
    const std::size_t room = group.arena_room();
    CLAIM(room == 8 << 20, "%zu", room);
    char* first = static_cast<char*>(group.allocate(1000));
    char* second = static_cast<char*>(group.allocate(1 << 20));
    char* third = static_cast<char*>(group.allocate(100));
    CLAIM(first && second && third && second >= first + 1000, "they overlap");
    CLAIM(third + 100 <= second ? third >= first + 1000 : third >= second + (1 << 20), "they overlap");
    CLAIM(reinterpret_cast<std::uintptr_t>(third) % 128 == 0, "unaligned");
    std::memset(second, 1, 1 << 20);
    CLAIM(group.owns(second + (1 << 20) - 1) && !group.owns(&group), "owns");
    CLAIM(group.allocate(room) == nullptr && group.allocate(~std::size_t{0}) == nullptr, "there is no such room");
    group.release(second);
    CLAIM(group.allocate(1 << 20) == second, "the gap was not used again");
    bool refused = false;
    try {
      group.release(first + 1);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CLAIM(refused, "released what it never gave");
  });
}

// Real processes: one is killed in the middle of it, the others raise long before the time limit, and name it.
inline void a_killed_process_is_named_by_all_survivors() {
  constexpr int kWorld = 3;
  Options options = small_options();
  options.mapping = nullptr;
  options.timeout_s = 600;
  const int memfd = static_cast<int>(syscall(SYS_memfd_create, "shoal-kill", 1u));
  CLAIM(ftruncate(memfd, static_cast<off_t>(ShmGroup::total_bytes(kWorld, options))) == 0, "no memory file");
  struct Page {
    std::atomic<int> pids[kWorld];
    std::atomic<int> rounds;
  };
  void* shared = mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  auto* page = static_cast<Page*>(shared);
  for (int rank = 0; rank < kWorld; ++rank) {
    const int pid = fork();
    if (pid == 0) {
      while (page->pids[0] == 0 || page->pids[1] == 0 || page->pids[2] == 0) std::this_thread::yield();
      std::vector<int> pidfds(kWorld, -1);
      for (int r = 0; r < kWorld; ++r) {
        if (r != rank) pidfds[r] = static_cast<int>(syscall(SYS_pidfd_open, page->pids[r].load(), 0));
      }
      const Failure failure = failure_of([&] {
        ShmGroup group(memfd, rank, kWorld, pidfds, options);
        std::vector<float> data(50000, 1.0f);
        for (;;) {
          group.all_reduce(data.data(), data.data(), data.size(), DType::f32, ReduceOp::max);
          page->rounds.fetch_add(1);
        }
      });
      claim_says(failure, Failure::dead_peer, {"rank 1 (pid " + std::to_string(page->pids[1].load()), "died"});
      std::_Exit(0);
    }
    page->pids[rank] = pid;
  }
  while (page->rounds.load() < 30) std::this_thread::yield();
  kill(page->pids[1], SIGKILL);
  for (int rank = 0; rank < kWorld; ++rank) {
    int status = 0;
    waitpid(page->pids[rank], &status, 0);
    CLAIM(rank == 1 ? WIFSIGNALED(status) : WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank %d: %x", rank, status);
  }
  munmap(page, sizeof(Page));
  close(memfd);
}

inline void a_forked_child_may_not_use_the_group() {
  on_ranks(1, small_options(), [](ShmGroup& group, int) {
    const int pid = fork();
    if (pid == 0) {
      claim_says(failure_of([&] { group.barrier(); }), Failure::aborted, {"forked"});
      std::_Exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    CLAIM(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%x", status);
    group.barrier();
  });
}

inline void test_failures() {
  a_killed_process_is_named_by_all_survivors();  // first: forks while there is one thread
  each_field_of_a_signature_is_compared();
  all_to_all_compares_each_pair();
  what_is_not_defined_is_refused_by_all();
  who_is_late_is_named_and_all_hear_of_it();
  abort_wakes_whoever_sleeps();
  who_has_left_is_not_waited_for();
  ranks_must_be_set_up_alike();
  a_rank_that_exists_already_is_refused_and_the_first_goes_on();
  the_arena_is_reused_and_has_an_end();
  a_forked_child_may_not_use_the_group();
}
