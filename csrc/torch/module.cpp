#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/kernels.h"

// The Python module. Importing it loads the library, whose static initialisers register the
// operators; all it offers by itself is what was built.

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cpu_capability"] = hfh::cpu::kernels().capability;
  info["cpu_capabilities"] = hfh::cpu::built_capabilities();
#if defined(HFH_HAS_CUDA)
  pybind11::dict cuda;
  cuda["version"] = PYBIND11_TOSTRING(HFH_CUDA_VERSION);
  cuda["code"] = pybind11::str(PYBIND11_TOSTRING(HFH_CUDA_CODE)).attr("split")();
  info["cuda"] = cuda;
#else
  info["cuda"] = pybind11::none();
#endif
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
  info["torch_built_against"] = TORCH_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // An HFH_CPU_CAPABILITY that names nothing should stop the import, not the first call.
  hfh::cpu::kernels();
  m.def("build_info", &build_info, "Compiler, instruction sets and versions of this build.");
}
