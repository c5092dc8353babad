#pragma once

#include <ATen/core/Tensor.h>

#include "inject.h"

// The op's table arguments as the kernels read them, on either device.
namespace fst_fast::inject {

inline Tables tables_of(const at::Tensor& table, const at::Tensor& noise,
                        const at::Tensor& patterns, const at::Tensor& maps,
                        const at::Tensor& sources, const at::Tensor& coords,
                        const at::Tensor& lookup) {
  return {table.const_data_ptr<int32_t>(),
          noise.const_data_ptr<float>(),
          patterns.const_data_ptr<int16_t>(),
          maps.const_data_ptr<uint8_t>(),
          sources.const_data_ptr<int32_t>(),
          coords.const_data_ptr<float>(),
          lookup.const_data_ptr<uint8_t>(),
          table.size(0),
          patterns.size(0),
          maps.size(0),
          sources.size(0),
          coords.size(0),
          lookup.size(0)};
}

}  // namespace fst_fast::inject
