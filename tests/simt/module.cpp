// The emulator for Python: the launchers by the names that the extension's submodule `cuda` has, and what tests steer and
// read.
#include <pybind11/pybind11.h>

#include "bindings/cuda.h"
#include "device.h"
#include "host/machine.h"
#include "host/memory.h"
#include "host/report.h"

namespace py = pybind11;
using namespace sparseprune;

namespace {

py::dict traffic(const std::map<std::string, simt::Traffic>& lines, const char* units) {
  py::dict all;
  for (const auto& [line, t] : lines) {
    py::dict d;
    d["requests"] = t.requests;
    d["bytes"] = t.bytes;
    d[units] = t.units;
    d["worst"] = t.worst;
    all[py::str(line)] = d;
  }
  return all;
}

py::list report() {
  py::list kernels;
  for (const auto& [name, r] : simt::reports()) {
    py::dict d;
    d["kernel"] = name;
    d["launches"] = r.launches;
    d["blocks"] = r.blocks;
    d["threads"] = r.threads;
    d["shared_bytes"] = r.shared_bytes;
    d["mma_sp"] = r.mma_sp;
    d["mma"] = r.mma;
    d["ldmatrix"] = r.ldmatrix;
    d["cp_async"] = r.cp_async;
    d["shuffles"] = r.shuffles;
    d["sync_warp"] = r.sync_warp;
    d["sync_block"] = r.sync_block;
    d["shared"] = traffic(r.shared, "turns");
    d["global"] = traffic(r.global, "sectors");
    kernels.append(d);
  }
  return kernels;
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  bind_cuda(m);

  // Buffers that kernels may touch; see host/memory.h.
  m.def(
      "register",
      [](std::uintptr_t address, std::size_t nbytes, bool writable) {
        simt::register_buffer(reinterpret_cast<const void*>(address), nbytes, writable);
      },
      py::arg("address"), py::arg("nbytes"), py::arg("writable"));
  m.def("clear", &simt::clear_buffers);

  // Of the order in which threads and blocks run; from SPARSEPRUNE_SIMT_SEED, else by chance.
  m.def("set_seed", &simt::set_seed, py::arg("seed"));
  m.def("seed", &simt::seed);
  m.def("set_sm_count", &simt::set_sm_count, py::arg("count"));

  // What each kernel has done since the last clear_report: a dict each, of the fields of host/report.h. Traffic is
  // that of the first blocks of each launch: so many, at first 1.
  m.def("report", &report);
  m.def("set_counted_blocks", [](unsigned count) { simt::machine.counted_blocks = count; }, py::arg("count"));
  m.def("clear_report", &simt::clear_reports);
}
