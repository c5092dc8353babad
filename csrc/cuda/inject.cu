#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../inject_tables.h"
#include "inject_show.cuh"
#include "inject_stage.cuh"
#include "launch.h"

namespace fst_fast::inject::device {
namespace {

// What a block stages, or shows, at most, unless a single row is more: several blocks share a
// multiprocessor, and some read while others write.
constexpr int kBandBytes = 11 * 1024;

// One block shows one band of rows of one sample, so all its threads take the same branches but at
// the edges. A sample that names what is not there becomes NaN.
template <int kChannels, bool kInterleaved, typename out_t>
__global__ void __launch_bounds__(kThreads, 4) inject_kernel(Problem<out_t> a) {
  constexpr int kPlanes = kInterleaved ? 1 : kChannels;
  constexpr int kPeriod = kInterleaved ? kChannels : 1;
  const int64_t b = blockIdx.x / static_cast<unsigned>(a.bands);
  const int first = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.bands)) * a.rows;
  const Sample sample = read_sample(a.params, b);
  auto* lut = reinterpret_cast<out_t*>(dynamic_shared());
  auto* staged = dynamic_shared() + kChannels * kLevels * sizeof(out_t) + kSlack;
  stage_lut<kChannels>(a.lut, lut);
  if (first == 0 && threadIdx.x == 0) a.labels[b] = sample.label;

  Crop crop;
  crop.rows = min(a.rows, a.out_height - first);
  crop.row_length = a.out_width * kPeriod;
  const int64_t plane = static_cast<int64_t>(a.out_height) * crop.row_length;
  out_t* out = a.out + b * kPlanes * plane + static_cast<int64_t>(first) * crop.row_length;
  Trigger trigger;
  if (!find_trigger<kChannels>(a, sample, trigger)) {
    for (int c = 0; c < kPlanes; ++c) {
      for (int i = threadIdx.x; i < crop.rows * crop.row_length; i += kThreads) {
        out[c * plane + i] = a.nan;
      }
    }
    return;
  }

  // Image row of output row 0, and image column of output column 0.
  const int row = first + sample.row;
  crop.flip = sample.flip > 0;
  const int column = crop.flip ? sample.column + a.out_width - 1 : sample.column;
  const int left = crop.flip ? sample.column + a.out_width - a.width : -sample.column;
  crop.line = a.width * kChannels;
  crop.start = column * kChannels;
  crop.begin = max(left, 0) * kPeriod;
  crop.end = min(left + a.width, a.out_width) * kPeriod;
  crop.top = max(-row, 0);
  crop.bottom = min(a.height - row, crop.rows);
  const int top = row + crop.top;
  // Without a row inside, none is staged or read.
  const int bottom = crop.bottom > crop.top ? row + crop.bottom : top;
  const auto* origin = stage_rows<kChannels>(a, sample, trigger, top, bottom, staged);
  crop.origin = origin - crop.top * crop.line;
  __syncthreads();
  for (int c = 0; c < kPlanes; ++c) {
    show<kChannels, kInterleaved>(a, crop, lut, c, out + c * plane);
  }
}

template <int kChannels, bool kInterleaved, typename out_t>
void launch_inject(Problem<out_t> a, int64_t batch) {
  constexpr int kStep = kThreads * 16 / sizeof(out_t);
  const int row_length = a.out_width * (kInterleaved ? kChannels : 1);
  a.step_rows = kStep / row_length;
  a.step_elements = kStep % row_length;
  a.rows = std::max(1, kBandBytes / (std::max(a.width, a.out_width) * kChannels));
  a.rows = std::min(a.rows, a.out_height);
  a.bands = (a.out_height + a.rows - 1) / a.rows;
  const int staged = (std::min(a.rows, a.height) * a.width * kChannels + 15 + 15) / 16 * 16;
  const size_t shared = kChannels * kLevels * sizeof(out_t) + kSlack + staged + kSlack;
  launch(inject_kernel<kChannels, kInterleaved, out_t>, batch * a.bands, kThreads, shared, a);
}

template <typename out_t>
void launch_channels(const Problem<out_t>& a, int64_t batch, int64_t channels, bool channels_last) {
  // With one channel both layouts are the same.
  if (channels == 1) return launch_inject<1, true>(a, batch);
  if (channels == 3 && channels_last) return launch_inject<3, true>(a, batch);
  if (channels == 3) return launch_inject<3, false>(a, batch);
  if (channels_last) return launch_inject<4, true>(a, batch);
  return launch_inject<4, false>(a, batch);
}

// Read in words of 16 bytes: a view into other memory may begin between them.
at::Tensor aligned(const at::Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % 16 == 0 ? tensor : tensor.clone();
}

// The arguments have passed the Python op's checks; values are checked where they are read.
std::tuple<at::Tensor, at::Tensor> inject_cuda(const at::Tensor& images, const at::Tensor& params,
                                               const at::Tensor& lut, const at::Tensor& table,
                                               const at::Tensor& noise, const at::Tensor& patterns,
                                               const at::Tensor& maps, const at::Tensor& sources,
                                               const at::Tensor& coords, const at::Tensor& lookup,
                                               int64_t height, int64_t width, bool channels_last) {
  const DeviceGuard guard(images.device());
  const int64_t batch = params.size(0), channels = images.size(3);
  const auto layout = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor out = at::empty({batch, channels, height, width}, lut.options(), layout);
  at::Tensor labels = at::empty({batch}, params.options().dtype(at::kLong));
  if (batch == 0) return {out, labels};
  const at::Tensor rows = aligned(params), levels = aligned(lut);
  const Tables tables = tables_of(table, noise, patterns, maps, sources, coords, lookup);
  const auto run = [&](auto nan) {
    using out_t = decltype(nan);
    Problem<out_t> a{};
    a.images = images.const_data_ptr<uint8_t>();
    a.params = rows.const_data_ptr<int32_t>();
    a.lut = static_cast<const out_t*>(levels.const_data_ptr());
    a.tables = tables;
    a.out = static_cast<out_t*>(out.mutable_data_ptr());
    a.labels = labels.mutable_data_ptr<int64_t>();
    a.image_count = images.size(0);
    a.height = static_cast<int>(images.size(1));
    a.width = static_cast<int>(images.size(2));
    a.out_height = static_cast<int>(height);
    a.out_width = static_cast<int>(width);
    a.nan = nan;
    launch_channels(a, batch, channels, channels_last);
  };
  if (lut.scalar_type() == at::kFloat) {
    run(uint32_t{0x7fc00000});
  } else {
    run(lut.scalar_type() == at::kHalf ? uint16_t{0x7e00} : uint16_t{0x7fc0});
  }
  return {out, labels};
}

}  // namespace
}  // namespace fst_fast::inject::device

namespace fst_fast {

TORCH_LIBRARY_IMPL(fst_fast_native, CUDA, m) { m.impl("inject", &inject::device::inject_cuda); }

}  // namespace fst_fast
