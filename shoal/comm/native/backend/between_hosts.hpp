// Collectives over several hosts: shared memory inside of each, and between them every slice on its own.
//
// The first `carriers` ranks of each host (as many as the smallest host has) carry a slice each to the ranks of the same
// place on the other hosts, so that all their connections work at the same time. A sum is taken host by host in their
// order, of what each host's ranks summed up in their order: the same bits everywhere, run after run.
//
// Before a byte of a caller's memory is written, carriers have compared what all hosts ask for: the request goes ahead
// of the data in the same direction, so that this costs no time of its own where there is much to move.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <string>
#include <vector>

#include "shm_group.hpp"
#include "wire.hpp"
#include "words.hpp"

namespace shoal {

struct Hosts {
  std::vector<std::vector<int>> ranks;  // of the group, by host; hosts in the order of their lowest ranks
  int host = 0, local = 0;              // this rank is ranks[host][local]
  int carriers() const;
  std::vector<int> place_of(int rank) const;  // {host, local}
};

// One collective, as it is carried out.
struct Doing {
  Request request;
  double timeout_s;  // 0: the group's
};

class BetweenHosts {
 public:
  BetweenHosts(ShmGroup& local, c10::intrusive_ptr<c10d::Backend> gloo, Hosts hosts, std::string name, double timeout_s);

  // All ranks of all hosts ask for the same; raises Failure on all of them where they do not. Also a barrier.
  void agree(const Doing&);
  void all_reduce(const Doing&, void* data, std::size_t count, DType, at::ScalarType, ReduceOp);
  void broadcast(const Doing&, void* data, std::size_t count, DType, int root);
  // outs[r] takes counts[r] elements from rank r
  void all_gather(const Doing&, const void* in, const std::vector<void*>& outs, const std::vector<std::size_t>& counts,
                  DType);
  // ins[r]: counts[r] elements for rank r
  void reduce_scatter(const Doing&, const std::vector<void*>& ins, void* out, const std::vector<std::size_t>& counts,
                      DType, at::ScalarType, ReduceOp);
  // ins[r]: in_counts[r] elements for rank r; outs[r]: out_counts[r] elements from rank r
  void all_to_all(const Doing&, const std::vector<void*>& ins, const std::vector<std::size_t>& in_counts,
                  const std::vector<void*>& outs, const std::vector<std::size_t>& out_counts, DType);
  void set_timeout(double timeout_s) { timeout_s_ = timeout_s; }
  void interrupt() { wire_.interrupt(); }  // by any thread
  void leave() { wire_.leave(); }          // by the one that calls the collectives

 private:
  struct Asked;  // the comparison of requests, under way
  template <typename Act>
  void asking(const Doing&, Act&&);
  struct Chunk;
  double limit(const Doing& doing) const { return doing.timeout_s > 0 ? doing.timeout_s : timeout_s_; }
  bool carrier() const { return hosts_.local < carriers_; }
  int peer(int host) const { return hosts_.ranks[host][hosts_.local]; }
  int hosts() const { return static_cast<int>(hosts_.ranks.size()); }
  int world() const;
  void compare(const Doing&, Asked&);
  void begin(const Doing&, Chunk&, const char* data, DType, ReduceOp, Asked&);
  void middle(const Doing&, Chunk&, DType, at::ScalarType, ReduceOp, Asked&);
  void finish(const Doing&, Chunk&, char* data, DType);
  void combine_hosts(const std::vector<const void*>& parts, void* out, std::size_t count, DType, at::ScalarType,
                     ReduceOp) const;

  ShmGroup& local_;
  Wire wire_;
  const Hosts hosts_;
  const int carriers_;
  const std::string name_;
  double timeout_s_;
};

}  // namespace shoal
