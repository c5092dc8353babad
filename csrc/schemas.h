#pragma once

#include <torch/library.h>

namespace fst_fast {

// The ops that have a kernel on every device.
inline void define_kernels(torch::Library& m) {
  m.def(
      "head_step_(Tensor(a!) weight, Tensor(b!)? bias, Tensor d_weight, Tensor? d_bias, "
      "Tensor(c!) weight_momentum, Tensor(d!)? bias_momentum, Tensor lr, float momentum, "
      "Tensor? norm, Tensor(e!)? weight_scale, Tensor? found_inf) -> ()");
  m.def(
      "head_deviation_loss(Tensor features, Tensor weight, Tensor? bias, Tensor labels, "
      "Tensor? weight0, Tensor? class_weight, Tensor? row_grad, Tensor? weight_scale, "
      "Tensor? alpha_scale, float alpha, str reduction, float label_smoothing, int ignore_index, "
      "bool[3] output_mask) -> (Tensor loss, Tensor cross_entropy, Tensor penalty, "
      "Tensor correct, Tensor invalid, Tensor d_features, Tensor d_weight, Tensor d_bias)");
  m.def(
      "inject(Tensor images, Tensor params, Tensor lut, Tensor table, Tensor noise, "
      "Tensor patterns, Tensor maps, Tensor sources, Tensor coords, Tensor lookup, int height, "
      "int width, bool channels_last) -> (Tensor, Tensor)");
  // Multiplies in place; where the factor is 1 nothing is read or written.
  m.def("rescale_(Tensor(a!)[] tensors, Tensor factor) -> ()");
}

}  // namespace fst_fast
