#include "between_hosts.hpp"

#include <algorithm>
#include <array>
#include <cstdio>

#include <ATen/OpMathType.h>

#include "shm_combine.hpp"

namespace shoal {
namespace {

constexpr int kRequestTag = 0x7f5a0001, kDataTag = 0x7f5a0002;  // users' own tags are small
constexpr std::size_t kChunkBytes = 4u << 20;   // of the whole buffer: shared memory works while the last one travels
constexpr std::size_t kWholeBytes = 64u << 10;  // a slice up to here goes to all hosts at once: one latency, not two
constexpr std::size_t kStages = 3;
constexpr double kLastWordS = 2.0;

std::size_t cut(std::size_t count, int index, int parts) { return count * index / parts; }

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g s", seconds);
  return text;
}

}  // namespace

int Hosts::carriers() const {
  std::size_t least = ranks[0].size();
  for (const auto& host : ranks) least = std::min(least, host.size());
  return static_cast<int>(least);
}

std::vector<int> Hosts::place_of(int rank) const {
  for (std::size_t h = 0; h < ranks.size(); ++h) {
    const auto found = std::find(ranks[h].begin(), ranks[h].end(), rank);
    if (found != ranks[h].end()) return {static_cast<int>(h), static_cast<int>(found - ranks[h].begin())};
  }
  throw Unusable("there is no rank " + std::to_string(rank) + " in the group");
}

struct BetweenHosts::Asked {
  std::vector<Request> theirs;
  bool compared = false;
  Exchange exchange;  // goes first
};

BetweenHosts::BetweenHosts(ShmGroup& local, c10::intrusive_ptr<c10d::Backend> gloo, Hosts hosts, std::string name,
                           double timeout_s)
    : local_(local),
      wire_(std::move(gloo), [&local] { return !local.why_aborted().empty(); }),
      hosts_(std::move(hosts)),
      carriers_(hosts_.carriers()),
      name_(std::move(name)),
      timeout_s_(timeout_s) {}

int BetweenHosts::world() const {
  int all = 0;
  for (const auto& host : hosts_.ranks) all += static_cast<int>(host.size());
  return all;
}

// Sends this rank's request and asks for those of other hosts; `compare` waits for them.
template <typename Act>
void BetweenHosts::asking(const Doing& doing, Act&& act) {
  if (const std::string why = local_.why_aborted(); !why.empty()) throw Failure(Failure::aborted, why);
  Asked asked{std::vector<Request>(hosts()), false, Exchange(wire_)};
  try {
    for (int h = 0; h < hosts() && carrier(); ++h) {
      if (h == hosts_.host) continue;
      asked.exchange.send(peer(h), &doing.request, sizeof(Request), kRequestTag);
      asked.exchange.receive(peer(h), &asked.theirs[h], sizeof(Request), kRequestTag);
    }
    act(asked);
  } catch (const Exchange::Lost& lost) {
    if (const std::string why = local_.why_aborted(); !why.empty()) throw Failure(Failure::aborted, why);
    const int self = hosts_.ranks[hosts_.host][hosts_.local];
    const std::string where = doing.request.text() + " in " + name_ + ", rank " + std::to_string(self) + ": ";
    throw Failure(lost.late ? Failure::timeout : Failure::dead_peer,
                  where + "rank " + std::to_string(lost.rank) + " on another host " +
                      (lost.late ? "is not there after " + seconds_text(limit(doing))
                                 : std::string("has gone, or has given up (") + lost.what() + ")"));
  } catch (const Failure& failure) {
    if (failure.kind == Failure::mismatch && !asked.compared) {
      // Ranks of this host disagree: the others must get to see both requests before the connections go.
      try {
        asked.exchange.wait(std::min(limit(doing), kLastWordS));
      } catch (const Exchange::Lost&) {
        throw failure;
      }
    }
    throw;
  }
}

void BetweenHosts::compare(const Doing& doing, Asked& asked) {
  if (asked.compared || !carrier()) return;
  asked.exchange.wait(limit(doing));
  asked.compared = true;
  asked.theirs[hosts_.host] = doing.request;
  const bool agree = std::all_of(asked.theirs.begin(), asked.theirs.end(),
                                 [&](const Request& r) { return r.agrees(doing.request); });
  if (agree) return;
  std::string text = "collective mismatch in " + name_ + ":";
  for (int h = 0; h < hosts(); ++h) {
    text += (h ? "; " : " ") + rank_list(hosts_.ranks[h]) + " asked for " + asked.theirs[h].text();
  }
  throw Failure(Failure::mismatch, text);
}

void BetweenHosts::agree(const Doing& doing) {
  local_.barrier(doing.timeout_s);
  asking(doing, [&](Asked& asked) {
    compare(doing, asked);
    local_.barrier(doing.timeout_s);  // whoever carries nothing hears of a mismatch here
  });
}

void BetweenHosts::combine_hosts(const std::vector<const void*>& parts, void* out, std::size_t count, DType dtype,
                                 at::ScalarType type, ReduceOp op) const {
  if (op != ReduceOp::avg) {
    combine(dtype, op, &out, 1, parts.data(), static_cast<int>(parts.size()), count);
    return;
  }
  const auto options = at::TensorOptions().dtype(type);
  const auto row = [&](const void* data) {
    return at::from_blob(const_cast<void*>(data), {static_cast<int64_t>(count)}, options);
  };
  at::Tensor sum = row(parts[0]).to(at::toOpMathType(type), /*non_blocking=*/false, /*copy=*/true);
  for (std::size_t i = 1; i < parts.size(); ++i) sum.add_(row(parts[i]));
  (sum.is_complex() ? at::view_as_real(sum) : sum).div_(world());  // part by part: exact to the last bit
  row(out).copy_(sum);                                             // rounded once, after the division
}

// A part of the buffer on its way: elements begin .. end of it, of which this rank carries one slice.
struct BetweenHosts::Chunk {
  explicit Chunk(Wire& wire) : exchange(wire) {}
  std::size_t begin = 0, end = 0;
  std::size_t slice = 0;  // elements that this rank carries
  bool pieces = false;    // each host sums up a piece of the slice; else every host all of it
  at::Tensor mine;        // the sum of this host's ranks, then of all
  std::vector<at::Tensor> theirs;
  Exchange exchange;
};

void BetweenHosts::begin(const Doing& doing, Chunk& chunk, const char* data, DType dtype, ReduceOp op,
                         Asked& asked) {
  const std::size_t each = size_of(dtype), count = chunk.end - chunk.begin;
  std::vector<const void*> ins(local_.world(), data);
  std::vector<std::size_t> counts(local_.world(), 0);
  for (int j = 0; j < carriers_; ++j) {
    ins[j] = data + (chunk.begin + cut(count, j, carriers_)) * each;
    counts[j] = cut(count, j + 1, carriers_) - cut(count, j, carriers_);
  }
  chunk.slice = counts[hosts_.local];
  chunk.mine = at::empty({static_cast<int64_t>(chunk.slice * each)}, at::kByte);
  local_.reduce_scatter(ins.data(), chunk.mine.data_ptr(), counts.data(), dtype,
                        op == ReduceOp::avg ? ReduceOp::sum : op, doing.timeout_s);
  if (!carrier()) return;
  compare(doing, asked);  // before data goes out: gloo ends the process that is sent more than it expects
  chunk.pieces = hosts() > 2 && chunk.slice * each > kWholeBytes;
  chunk.theirs.assign(hosts(), at::Tensor());
  const char* mine = static_cast<const char*>(chunk.mine.data_ptr());
  const auto piece = [&](int h) { return chunk.pieces ? cut(chunk.slice, h, hosts()) : h > 0 ? chunk.slice : 0; };
  const std::size_t own = chunk.pieces ? piece(hosts_.host + 1) - piece(hosts_.host) : chunk.slice;
  for (int h = 0; h < hosts(); ++h) {
    if (h == hosts_.host) continue;
    chunk.theirs[h] = at::empty({static_cast<int64_t>(own * each)}, at::kByte);
    chunk.exchange.receive(peer(h), chunk.theirs[h].data_ptr(), own * each, kDataTag);
    if (chunk.pieces) {
      chunk.exchange.send(peer(h), mine + piece(h) * each, (piece(h + 1) - piece(h)) * each, kDataTag);
    } else {
      chunk.exchange.send(peer(h), mine, chunk.slice * each, kDataTag);
    }
  }
}

void BetweenHosts::middle(const Doing& doing, Chunk& chunk, DType dtype, at::ScalarType type, ReduceOp op,
                          Asked& asked) {
  compare(doing, asked);
  if (!carrier()) return;
  const std::size_t each = size_of(dtype);
  chunk.exchange.wait(limit(doing));
  char* mine = static_cast<char*>(chunk.mine.data_ptr());
  const std::size_t from = chunk.pieces ? cut(chunk.slice, hosts_.host, hosts()) : 0;
  const std::size_t to = chunk.pieces ? cut(chunk.slice, hosts_.host + 1, hosts()) : chunk.slice;
  std::vector<const void*> parts;
  for (int h = 0; h < hosts(); ++h) {
    parts.push_back(h == hosts_.host ? mine + from * each : static_cast<const char*>(chunk.theirs[h].data_ptr()));
  }
  combine_hosts(parts, mine + from * each, to - from, dtype, type, op);
  for (int h = 0; h < hosts() && chunk.pieces; ++h) {
    if (h == hosts_.host) continue;
    const std::size_t a = cut(chunk.slice, h, hosts()), b = cut(chunk.slice, h + 1, hosts());
    chunk.exchange.receive(peer(h), mine + a * each, (b - a) * each, kDataTag);
    chunk.exchange.send(peer(h), mine + from * each, (to - from) * each, kDataTag);
  }
}

void BetweenHosts::finish(const Doing& doing, Chunk& chunk, char* data, DType dtype) {
  if (carrier()) chunk.exchange.wait(limit(doing));
  const std::size_t each = size_of(dtype), count = chunk.end - chunk.begin;
  std::vector<void*> outs(local_.world(), data);
  std::vector<std::size_t> counts(local_.world(), 0);
  for (int j = 0; j < carriers_; ++j) {
    outs[j] = data + (chunk.begin + cut(count, j, carriers_)) * each;
    counts[j] = cut(count, j + 1, carriers_) - cut(count, j, carriers_);
  }
  local_.all_gather(chunk.mine.data_ptr(), outs.data(), counts.data(), dtype, doing.timeout_s);
}

void BetweenHosts::all_reduce(const Doing& doing, void* data, std::size_t count, DType dtype, at::ScalarType type,
                              ReduceOp op) {
  asking(doing, [&](Asked& asked) {
    const std::size_t room = std::max<std::size_t>(kChunkBytes / size_of(dtype), 1);
    const std::size_t chunks = std::max<std::size_t>((count + room - 1) / room, 1);
    std::array<std::unique_ptr<Chunk>, kStages> ring;
    char* bytes = static_cast<char*>(data);
    for (std::size_t k = 0; k < chunks + kStages - 1; ++k) {
      if (k < chunks) {
        auto& chunk = ring[k % kStages] = std::make_unique<Chunk>(wire_);
        chunk->begin = k * room;
        chunk->end = std::min(count, chunk->begin + room);
        begin(doing, *chunk, bytes, dtype, op, asked);
      }
      if (k >= 1 && k - 1 < chunks) middle(doing, *ring[(k - 1) % kStages], dtype, type, op, asked);
      if (k >= 2) finish(doing, *ring[(k - 2) % kStages], bytes, dtype);
    }
  });
}

void BetweenHosts::broadcast(const Doing& doing, void* data, std::size_t count, DType dtype, int root) {
  asking(doing, [&](Asked& asked) {
    compare(doing, asked);
    const auto place = hosts_.place_of(root);
    const std::size_t each = size_of(dtype);
    const bool here = place[0] == hosts_.host;
    if (here) local_.broadcast(data, count, dtype, place[1], doing.timeout_s);
    std::vector<void*> outs(local_.world(), data);
    std::vector<std::size_t> counts(local_.world(), 0);
    for (int j = 0; j < carriers_; ++j) {
      outs[j] = static_cast<char*>(data) + cut(count, j, carriers_) * each;
      counts[j] = cut(count, j + 1, carriers_) - cut(count, j, carriers_);
    }
    void* mine = outs[hosts_.local];
    const std::size_t bytes = counts[hosts_.local] * each;
    Exchange exchange(wire_);
    if (carrier() && here) {
      for (int h = 0; h < hosts(); ++h) {
        if (h != hosts_.host) exchange.send(peer(h), mine, bytes, kDataTag);
      }
    } else if (carrier()) {
      exchange.receive(peer(place[0]), mine, bytes, kDataTag);
    }
    exchange.wait(limit(doing));
    if (!here) local_.all_gather(mine, outs.data(), counts.data(), dtype, doing.timeout_s);
  });
}

void BetweenHosts::all_gather(const Doing& doing, const void* in, const std::vector<void*>& outs,
                              const std::vector<std::size_t>& counts, DType dtype) {
  asking(doing, [&](Asked& asked) {
    compare(doing, asked);
    const std::size_t each = size_of(dtype);
    // A round of a host: those of its ranks that lie `carriers` after one another; each carrier takes care of one.
    const auto round = [&](int host, std::size_t first, const auto& visit) {
      const auto& ranks = hosts_.ranks[host];
      for (std::size_t j = 0; j < static_cast<std::size_t>(carriers_) && first + j < ranks.size(); ++j) {
        visit(static_cast<int>(j), ranks[first + j]);
      }
    };
    const auto gather = [&](const void* from, const std::vector<void*>& to, const std::vector<std::size_t>& sizes) {
      local_.all_gather(from, to.data(), sizes.data(), dtype, doing.timeout_s);
    };
    std::vector<void*> to(local_.world());
    std::vector<std::size_t> sizes(local_.world());
    for (int i = 0; i < local_.world(); ++i) {
      to[i] = outs[hosts_.ranks[hosts_.host][i]];
      sizes[i] = counts[hosts_.ranks[hosts_.host][i]];
    }
    gather(in, to, sizes);
    Exchange sending(wire_);
    std::vector<std::unique_ptr<Exchange>> receiving;
    for (int h = 0; h < hosts(); ++h) {
      for (std::size_t first = 0; first < hosts_.ranks[h].size(); first += carriers_) {
        round(h, first, [&](int j, int rank) {
          if (j != hosts_.local) return;
          for (int g = 0; g < hosts(); ++g) {
            if (h == hosts_.host && g != h) sending.send(peer(g), outs[rank], counts[rank] * each, kDataTag);
          }
          if (h != hosts_.host) {
            receiving.push_back(std::make_unique<Exchange>(wire_));
            receiving.back()->receive(peer(h), outs[rank], counts[rank] * each, kDataTag);
          }
        });
      }
    }
    std::size_t next = 0;
    for (int h = 0; h < hosts(); ++h) {
      if (h == hosts_.host) continue;
      for (std::size_t first = 0; first < hosts_.ranks[h].size(); first += carriers_) {
        std::fill(to.begin(), to.end(), outs[0]);
        std::fill(sizes.begin(), sizes.end(), 0);
        const void* own = outs[0];
        bool carries = false;
        round(h, first, [&](int j, int rank) {
          to[j] = outs[rank];
          sizes[j] = counts[rank];
          if (j == hosts_.local) carries = true, own = outs[rank];
        });
        if (carries) receiving[next++]->wait(limit(doing));
        gather(own, to, sizes);
      }
    }
    sending.wait(limit(doing));
  });
}

void BetweenHosts::reduce_scatter(const Doing& doing, const std::vector<void*>& ins, void* out,
                                  const std::vector<std::size_t>& counts, DType dtype, at::ScalarType type,
                                  ReduceOp op) {
  asking(doing, [&](Asked& asked) {
    const std::size_t each = size_of(dtype);
    const auto memory = [&](std::size_t count) { return at::empty({static_cast<int64_t>(count * each)}, at::kByte); };
    // This host's sums for every rank of the group, each at the carrier that takes care of it.
    std::vector<at::Tensor> sums(counts.size());
    const auto& own = hosts_.ranks[hosts_.host];
    std::vector<std::vector<at::Tensor>> theirs(hosts());
    Exchange sending(wire_), receiving(wire_);  // go before the memory that they read and write
    for (int h = 0; h < hosts(); ++h) {
      const auto& ranks = hosts_.ranks[h];
      for (std::size_t first = 0; first < ranks.size(); first += carriers_) {
        std::vector<const void*> from(local_.world(), ins[0]);
        std::vector<std::size_t> sizes(local_.world(), 0);
        for (std::size_t j = 0; j < static_cast<std::size_t>(carriers_) && first + j < ranks.size(); ++j) {
          from[j] = ins[ranks[first + j]];
          sizes[j] = counts[ranks[first + j]];
        }
        const std::size_t mine = sizes[hosts_.local];
        at::Tensor sum = memory(mine);
        local_.reduce_scatter(from.data(), sum.data_ptr(), sizes.data(), dtype,
                              op == ReduceOp::avg ? ReduceOp::sum : op, doing.timeout_s);
        if (!carrier() || first + hosts_.local >= ranks.size()) continue;
        sums[ranks[first + hosts_.local]] = sum;
        compare(doing, asked);
        if (h != hosts_.host) sending.send(peer(h), sum.data_ptr(), mine * each, kDataTag);
      }
    }
    for (int h = 0; h < hosts() && carrier(); ++h) {
      if (h == hosts_.host) continue;
      for (std::size_t i = hosts_.local; i < own.size(); i += carriers_) {
        theirs[h].push_back(memory(counts[own[i]]));
        receiving.receive(peer(h), theirs[h].back().data_ptr(), counts[own[i]] * each, kDataTag);
      }
    }
    compare(doing, asked);
    receiving.wait(limit(doing));
    // Every result is at its carrier; to its rank it goes by the host's shared memory.
    std::vector<const void*> send(local_.world(), ins[0]);
    std::vector<std::size_t> send_counts(local_.world(), 0), receive_counts(local_.world(), 0);
    std::vector<void*> outs(local_.world(), out);
    for (std::size_t i = hosts_.local, t = 0; i < own.size() && carrier(); i += carriers_, ++t) {
      std::vector<const void*> parts;
      for (int h = 0; h < hosts(); ++h) {
        parts.push_back(h == hosts_.host ? sums[own[i]].data_ptr() : theirs[h][t].data_ptr());
      }
      combine_hosts(parts, sums[own[i]].data_ptr(), counts[own[i]], dtype, type, op);
      send[i] = sums[own[i]].data_ptr();
      send_counts[i] = counts[own[i]];
    }
    receive_counts[hosts_.local % carriers_] = counts[own[hosts_.local]];
    local_.all_to_all(send.data(), send_counts.data(), outs.data(), receive_counts.data(), dtype, doing.timeout_s);
    sending.wait(limit(doing));
  });
}

void BetweenHosts::all_to_all(const Doing& doing, const std::vector<void*>& ins,
                              const std::vector<std::size_t>& in_counts, const std::vector<void*>& outs,
                              const std::vector<std::size_t>& out_counts, DType dtype) {
  asking(doing, [&](Asked& asked) {
    compare(doing, asked);
    local_.barrier(doing.timeout_s);  // whoever carries nothing hears of a mismatch here
    const std::size_t each = size_of(dtype);
    std::vector<std::uint64_t> sent(in_counts.begin(), in_counts.end()), told(in_counts.size(), 0);
    const auto elsewhere = [&](const auto& visit) {
      for (int h = 0; h < hosts(); ++h) {
        for (const int rank : hosts_.ranks[h]) {
          if (h != hosts_.host) visit(rank);
        }
      }
    };
    Exchange sizes(wire_), data(wire_);
    elsewhere([&](int rank) {
      sizes.send(rank, &sent[rank], sizeof(std::uint64_t), kRequestTag);
      sizes.receive(rank, &told[rank], sizeof(std::uint64_t), kRequestTag);
    });
    sizes.wait(limit(doing));
    elsewhere([&](int rank) {
      if (told[rank] == out_counts[rank]) return;
      throw Failure(Failure::mismatch, "collective mismatch in " + name_ + ": " + doing.request.text() + ": rank " +
                                           std::to_string(rank) + " sends " + std::to_string(told[rank]) +
                                           " elements where " + std::to_string(out_counts[rank]) + " are expected");
    });
    elsewhere([&](int rank) {
      data.receive(rank, outs[rank], out_counts[rank] * each, kDataTag);
      data.send(rank, ins[rank], in_counts[rank] * each, kDataTag);
    });
    std::vector<const void*> from;
    std::vector<void*> to;
    std::vector<std::size_t> from_counts, to_counts;
    for (const int rank : hosts_.ranks[hosts_.host]) {
      from.push_back(ins[rank]);
      to.push_back(outs[rank]);
      from_counts.push_back(in_counts[rank]);
      to_counts.push_back(out_counts[rank]);
    }
    local_.all_to_all(from.data(), from_counts.data(), to.data(), to_counts.data(), dtype, doing.timeout_s);
    data.wait(limit(doing));
  });
}

}  // namespace shoal
