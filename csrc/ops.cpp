#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>

#include "cpu/isa.h"
#include "schemas.h"

TORCH_LIBRARY(fst_fast_native, m) {
  fst_fast::define_kernels(m);
  // head_deviation_loss with its derivative, for eager mode: a Python autograd function costs a
  // small head more than the loss does. Under torch.compile the op registered in Python is traced
  // instead.
  m.def(
      "head_deviation_autograd(Tensor features, Tensor weight, Tensor? bias, Tensor labels, "
      "Tensor? weight0, Tensor? class_weight, Tensor? weight_scale, Tensor? alpha_scale, "
      "float alpha, str reduction, float label_smoothing, int ignore_index) -> (Tensor loss, "
      "Tensor cross_entropy, "
      "Tensor penalty, Tensor correct, Tensor invalid)");
}

namespace {

namespace py = pybind11;
using namespace fst_fast;

py::dict build_report() {
  py::dict report;
  report["torch"] = TORCH_VERSION;
#ifdef __VERSION__
  report["compiler"] = __VERSION__;
#else
  report["compiler"] = py::none();
#endif
#ifdef FST_FAST_CUDA_VERSION
  report["cuda"] = FST_FAST_CUDA_VERSION;
  report["architectures"] = FST_FAST_CUDA_ARCHITECTURES;
#else
  report["cuda"] = py::none();
  report["architectures"] = py::none();
#endif
  report["instruction_sets"] = instruction_sets();
  report["instruction_set"] = instruction_sets().at(instruction_set);
  return report;
}

// For tests: makes the CPU kernels use a lesser instruction set than the machine has.
void use_instruction_set(const std::string& name) {
  const auto& names = instruction_sets();
  const auto found = std::find(names.begin(), names.end(), name);
  const int level = static_cast<int>(found - names.begin());
  if (found == names.end() || level > best_instruction_set()) {
    throw py::value_error("use_instruction_set: " + name + " is not compiled in, or is more than " +
                          "this processor has");
  }
  instruction_set = level;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_report", &build_report);
  m.def("use_instruction_set", &use_instruction_set);
}
