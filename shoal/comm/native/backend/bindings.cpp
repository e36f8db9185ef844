// What Python sees: the making of a group, its memory and its counters.
#include <torch/csrc/utils/pybind.h>

#include <pybind11/chrono.h>

#include "backend.hpp"

namespace shoal {
namespace {

namespace py = pybind11;

py::dict counters_of(const ShoalBackend& backend) {
  py::dict all;
  for (int op = 0; op < kOps; ++op) {
    const OpCounters c = backend.local()->counters(static_cast<Op>(op));
    py::dict one;
    one["calls"] = c.calls;
    one["bytes"] = c.bytes;
    one["zero_copy_calls"] = c.zero_copy_calls;
    one["moving_s"] = c.moving_s;
    py::dict waits;
    const auto& ranks = backend.hosts().ranks[backend.hosts().host];
    for (std::size_t i = 0; i < c.waiting_s.size(); ++i) waits[py::int_(ranks[i])] = c.waiting_s[i];
    one["waiting_s"] = waits;
    all[name_of(static_cast<Op>(op))] = one;
  }
  return all;
}

// A Python object that may be let go of by any thread.
std::shared_ptr<py::object> kept(py::object object) {
  return {new py::object(std::move(object)), [](py::object* held) {
            if (!Py_IsInitialized()) return;
            const py::gil_scoped_acquire acquired;
            delete held;
          }};
}

// The group around it, and how it was made (a shoal.comm.backend.registration.Membership).
struct Bound : ShoalBackend {
  template <typename... Rest>
  explicit Bound(std::shared_ptr<py::object> membership_, Rest&&... rest)
      : ShoalBackend(std::forward<Rest>(rest)...), membership(std::move(membership_)) {}
  const std::shared_ptr<py::object> membership;
};

Options options_of(const std::string& name, double timeout_s, int usable_cores) {
  Options options;
  options.name = name;
  options.timeout_s = timeout_s;
  options.usable_cores = usable_cores;
  return options;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("reserved_bytes", [](int world) { return ShmGroup::reserved_bytes(world, Options()); });
  m.def("total_bytes", [](int world) { return ShmGroup::total_bytes(world, Options()); });
  m.attr("most_ranks") = int(ShmGroup::kMostRanks);

  py::class_<ShmGroup, std::shared_ptr<ShmGroup>>(m, "ShmGroup")
      .def(py::init([](int memfd, int rank, int world, const std::vector<int>& pidfds, const std::string& name,
                       double timeout_s, int usable_cores) {
             const py::gil_scoped_release released;  // waits for the others
             return std::make_shared<ShmGroup>(memfd, rank, world, pidfds, options_of(name, timeout_s, usable_cores));
           }),
           py::arg("memfd"), py::arg("rank"), py::arg("world"), py::arg("pidfds"), py::arg("name"),
           py::arg("timeout_s"), py::arg("usable_cores"));

  py::class_<Bound, c10d::Backend, c10::intrusive_ptr<Bound>>(m, "ShoalBackend")
      .def(py::init([](std::shared_ptr<ShmGroup> local, const c10::intrusive_ptr<c10d::Backend>& gloo,
                       const std::optional<c10::intrusive_ptr<c10d::Backend>>& between,
                       std::vector<std::vector<int>> hosts, int rank, int size, std::string kind, std::string name,
                       std::chrono::milliseconds timeout, py::object membership) {
             Hosts all{std::move(hosts), 0, 0};
             const auto place = all.place_of(rank);
             all.host = place[0];
             all.local = place[1];
             const auto member = kept(std::move(membership));
             const ShoalBackend::Maker maker = [member](const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                                        const c10::intrusive_ptr<c10d::Backend::Options>& options) {
               const py::gil_scoped_acquire acquired;
               return member->attr("make")(store, rank, size, options).cast<c10::intrusive_ptr<c10d::Backend>>();
             };
             return c10::make_intrusive<Bound>(member, std::move(local), gloo,
                                               between.value_or(nullptr), std::move(all), rank, size,
                                               std::move(kind), std::move(name), timeout, maker);
           }),
           py::arg("local"), py::arg("gloo"), py::arg("between"), py::arg("hosts"), py::arg("rank"), py::arg("size"), py::arg("kind"),
           py::arg("name"), py::arg("timeout"), py::arg("membership"))
      .def_property_readonly("timeout", [](Bound& b) { return b.getBackendOptions()->timeout; })
      .def_property_readonly("membership", [](const Bound& b) { return *b.membership; })
      .def("counters", [](const Bound& b) { return counters_of(b); })
      .def("why_aborted", [](const Bound& b) { return b.local()->why_aborted(); })
      .def("owns", [](const Bound& b, std::uintptr_t memory) {
        return b.local()->owns(reinterpret_cast<const void*>(memory));
      })
      .def("arena_room", [](const Bound& b) { return b.local()->arena_room(); })
      .def_property_readonly("hosts", [](const Bound& b) { return b.hosts().ranks; });
}

}  // namespace shoal
