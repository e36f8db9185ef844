// The group around the operations: who runs them, how they fail, how it ends.
#include "backend.hpp"

#include <Python.h>

#include <ATen/record_function.h>

#include <algorithm>
#include <cstring>

namespace shoal {
namespace {

// Waiting for peers, or for a thread that needs the interpreter, while holding it would stop everything.
class WithoutInterpreter {
 public:
  WithoutInterpreter() : state_(Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~WithoutInterpreter() {
    if (state_) PyEval_RestoreThread(state_);
  }

 private:
  PyThreadState* state_;
};

}  // namespace

ShoalBackend::ShoalBackend(std::shared_ptr<ShmGroup> local, c10::intrusive_ptr<c10d::Backend> gloo,
                           c10::intrusive_ptr<c10d::Backend> between, Hosts hosts, int rank, int size, std::string kind, std::string name, std::chrono::milliseconds timeout,
                           Maker maker)
    : Backend(rank, size),
      local_(std::move(local)),
      gloo_(std::move(gloo)),
      hosts_(std::move(hosts)),
      kind_(std::move(kind)),
      name_(std::move(name)),
      options_(c10::make_intrusive<Options>(kind_, timeout)),
      maker_(std::move(maker)) {
  if (!one_host()) {
    between_ = std::make_unique<BetweenHosts>(*local_, std::move(between), hosts_, name_, seconds_of(timeout));
  }
  local_->set_timeout(seconds_of(timeout));
  init();
}

ShoalBackend::~ShoalBackend() {
  const WithoutInterpreter released;
  queue_->close();
}

void ShoalBackend::setTimeout(std::chrono::milliseconds timeout) {
  options_->timeout = timeout;
  local_->set_timeout(seconds_of(timeout));
  if (between_) between_->set_timeout(seconds_of(timeout));
  gloo_->setTimeout(timeout);
}

c10::intrusive_ptr<c10d::Backend> ShoalBackend::split(const c10::intrusive_ptr<c10d::Store>& store,
                                                      const std::vector<int>& ranks,
                                                      const c10::intrusive_ptr<Options>& options) {
  const auto found = std::find(ranks.begin(), ranks.end(), rank_);
  if (found == ranks.end()) return nullptr;
  return maker_(store, static_cast<int>(found - ranks.begin()), static_cast<int>(ranks.size()), options);
}

c10d::ErrorType ShoalBackend::getError() {
  return local_->why_aborted().empty() ? c10d::ErrorType::SUCCESS : c10d::ErrorType::COMM_ERROR;
}

void ShoalBackend::abort() {
  const WithoutInterpreter released;
  local_->abort("rank " + std::to_string(rank_) + " aborted " + name_);
  gloo_->abort();
  if (!between_) return;
  between_->interrupt();
  queue_->run_here([this] { between_->leave(); });  // a call under way sees to it itself
}

void ShoalBackend::shutdown() {
  const WithoutInterpreter released;
  queue_->close();
  gloo_->shutdown();
}

at::Tensor ShoalBackend::allocateTensor(long size, at::TensorOptions options) {
  TORCH_CHECK_VALUE(size >= 0, "a tensor of ", size, " elements cannot be made");
  const std::size_t bytes = static_cast<std::size_t>(size) * options.dtype().itemsize();
  void* memory = bytes ? local_->allocate(bytes) : nullptr;
  if (!memory) return at::empty({size}, options);  // the same numbers, with a copy more
  return at::from_blob(memory, {size}, [group = local_](void* m) { group->release(m); }, options);
}

// Carries out a call, and says in the words of torch what went wrong.
void ShoalBackend::explained(const Act& act, Doing doing) {
  try {
    act(doing);
  } catch (const Unusable& error) {
    // The other ranks are in the call, or will be: they must not wait for this one.
    try {
      Doing refusal{Request(), doing.timeout_s};
      refusal.request.sequence = doing.request.sequence;
      refusal.request.type = doing.request.type;
      refusal.request.unusable = 1;
      agree(refusal);
    } catch (const Failure& failure) {  // they have failed, as this one does
      give_up(failure.what());
    }
    throw c10::ValueError(error.what(), nullptr, nullptr);
  } catch (const Failure& failure) {
    give_up(failure.what());
    throw c10::DistBackendError(failure.what(), nullptr, nullptr);
  }
}

// Between hosts, whatever fails ends the group: the own host learns it by its memory, the others by the connections.
void ShoalBackend::give_up(const std::string& why) {
  if (!between_) return;
  local_->abort(why);
  between_->leave();
}

// All ranks ask for the same, or all raise. Only for what ShmGroup does not compare itself.
void ShoalBackend::agree(const Doing& doing) {
  const int world = local_->world();
  std::vector<Request> asked(world);
  local_->all_gather(&doing.request, asked.data(), sizeof(Request), DType::raw, doing.timeout_s);
  const bool agreed = std::all_of(asked.begin(), asked.end(), [&](const Request& r) { return r.agrees(asked[0]); });
  if (!agreed) {
    std::string text = "collective mismatch in " + name_ + ":";
    for (int r = 0; r < world; ++r) {
      text += (r ? "; rank " : " rank ") + std::to_string(hosts_.ranks[hosts_.host][r]) + " asked for " + asked[r].text();
    }
    throw Failure(Failure::mismatch, text);
  }
  if (between_) between_->agree(doing);
}

// The one way in for all collectives.
ShoalBackend::WorkPtr ShoalBackend::call(c10d::OpType type, const char* title, bool async,
                                         std::chrono::milliseconds timeout, Results results, Act act) {
  Doing doing{Request(), seconds_of(timeout)};
  doing.request.sequence = ++sequence_;
  doing.request.type = static_cast<std::uint8_t>(type);
  if (!async) {
    const WithoutInterpreter released;
    const bool ran = queue_->run_here([&] {
      at::RecordFunction record(at::RecordScope::USER_SCOPE);
      if (record.isActive()) record.before(title);
      explained(act, doing);
    });
    if (ran) {
      auto work = c10::make_intrusive<CallWork>(rank_, type, nullptr, std::move(results), doing.request.sequence);
      work->done(nullptr);
      return work;
    }
  }
  auto work = c10::make_intrusive<CallWork>(rank_, type, title, std::move(results), doing.request.sequence);
  queue_->post(work, [this, act = std::move(act), doing] { explained(act, doing); });
  if (!async) {
    const WithoutInterpreter released;
    work->wait(kNoTimeout);
  }
  return work;
}

}  // namespace shoal
