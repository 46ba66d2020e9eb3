// isthmus._C: importing it registers the ops (csrc/library.cpp); besides, it answers questions about the build and
// sets the instruction set. No torch header.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/isa.h"

namespace py = pybind11;

namespace {

std::vector<std::string> isa_names(const std::vector<isthmus::Isa>& isas) {
  std::vector<std::string> names;
  for (isthmus::Isa isa : isas) names.push_back(isthmus::isa_name(isa));
  return names;
}

py::dict build_info() {
  using namespace py::literals;
  return py::dict("version"_a = ISTHMUS_VERSION, "torch_built_against"_a = ISTHMUS_TORCH_VERSION,
                  "compiler"_a = ISTHMUS_COMPILER, "isa_compiled"_a = py::str(ISTHMUS_ISA_COMPILED).attr("split")(","),
                  "isa_available"_a = isa_names(isthmus::available_isas()),
                  "isa"_a = isthmus::isa_name(isthmus::current_isa()), "cuda"_a = ISTHMUS_CUDA_STATUS);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("build_info", &build_info);
  m.def("get_isa", [] { return isthmus::isa_name(isthmus::current_isa()); });
  m.def("set_isa", [](const std::string& level) { isthmus::set_isa(isthmus::parse_isa(level)); });
  m.def("reset_isa", &isthmus::reset_isa);
}
