#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../inject_tables.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "inject_normalize.h"
#include "inject_trigger.h"
#include "isa.h"

namespace fst_fast {
namespace {

using namespace inject;

// Bytes without a trigger that take as long as waking a second thread.
constexpr double kGrainBytes = 1 << 18;

struct Call {
  Image image, shown;
  const uint8_t* images;
  int64_t image_count;
  const int32_t* params;
  Tables tables;
  bool channels_last;
  std::vector<Mapped> mapped;  // of each trigger that occurs
};

void check_within(const char* name, int64_t value, int64_t least, int64_t end, const char* of,
                  int64_t row) {
  TORCH_CHECK_VALUE(value >= least && value < end, "inject: params must have a ", name, " in ",
                    least, "..", end - 1, ", a row of ", of, ", got ", value, " (number ", row,
                    " of those)");
}

// What a trigger names must be there: nothing is read outside the tables.
void check_trigger(Call& call, int32_t trigger) {
  const Tables& t = call.tables;
  const int32_t* row = t.table + static_cast<int64_t>(trigger) * kFields;
  const int64_t elements = call.image.bytes();
  const auto inside = [](int64_t index, int64_t count) { return index >= 0 && index < count; };
  bool good = true;
  if (row[kFlags] & kGather) good &= inside(row[kGathered], t.source_count);
  if (row[kFlags] & kBilinear) good &= inside(row[kCoords], t.coords_count);
  if (row[kFlags] & kYCrCb) good &= call.image.channels == 3;
  if (row[kFlags] & kMapped) {
    good &= inside(row[kPattern], t.pattern_count) && inside(row[kMap], t.map_count);
  }
  if (good && row[kFlags] & kMapped) {
    call.mapped[trigger] = find_mapped(call.image, t.patterns + row[kPattern] * elements,
                                       t.maps + row[kMap] * kLevels, t.map_count - row[kMap]);
    good = !call.mapped[trigger].spans.empty();
  }
  TORCH_CHECK_VALUE(good, "inject: triggers.table must name tables that are there, got row ",
                    trigger, " with pattern ", row[kPattern], ", map ", row[kMap], ", sources ",
                    row[kGathered], ", coords ", row[kCoords],
                    "; use the tables of fst_fast.triggers.lower");
}

void check_rows(Call& call, int64_t batch) {
  call.mapped.resize(call.tables.triggers);
  std::vector<bool> seen(call.tables.triggers);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* row = call.params + b * kParams;
    check_within("source", row[kSource], 0, call.image_count, "images", b);
    check_within("trigger", row[kTrigger], -1, call.tables.triggers, "triggers.table", b);
    if (row[kTrigger] < 0) continue;
    if (call.tables.table[row[kTrigger] * kFields + kFlags] & kLookup) {
      check_within("key", row[kKey], 0, call.tables.lookup_count, "triggers.lookup", b);
    }
    if (!seen[row[kTrigger]]) check_trigger(call, row[kTrigger]);
    seen[row[kTrigger]] = true;
  }
}

// How many times as long as an image without a trigger this checked row takes, about.
double cost(const Call& call, const int32_t* params) {
  if (params[kTrigger] < 0) return 1;
  if (is_patch(call.tables, params, call.mapped[params[kTrigger]])) return 1;
  const int32_t flags = call.tables.table[params[kTrigger] * kFields + kFlags];
  if (flags & kBilinear) return 16;
  if (flags & kYCrCb) return 6;
  if (flags & kMapped) return 4;
  return flags & kGather ? 2 : 1;
}

#ifdef FST_FAST_X86_LEVELS
// Pixels of 3 bytes from the last one on, five at a time, as long as one more is to come: a byte
// too many is read before them, and one is written behind them. Returns how many are left.
FST_FAST_INLINE inline int64_t mirror_fives(const uint8_t* from, int64_t pixels, uint8_t* to) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  const Bytes order = {13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, 0};
  for (; pixels > 5; pixels -= 5, to += 15) {
    Bytes five;
    std::memcpy(&five, from + (pixels - 5) * 3 - 1, sizeof(five));
    five = __builtin_shuffle(five, order);
    std::memcpy(to, &five, sizeof(five));
  }
  return pixels;
}
#endif

// One row of pixels, mirrored.
template <int kChannels>
FST_FAST_INLINE inline void mirror(const uint8_t* from, int64_t pixels, uint8_t* to) {
  int64_t left = pixels;
#ifdef FST_FAST_X86_LEVELS
  if constexpr (kChannels == 3) left = mirror_fives(from, pixels, to);
#endif
  for (int64_t i = pixels - left; i < pixels; ++i) {
    std::memcpy(to + i * kChannels, from + (pixels - 1 - i) * kChannels, kChannels);
  }
}

// [height, width, C] bytes from an offset, 0 outside the image, then mirrored.
template <int kChannels>
FST_FAST_INLINE inline void crop(const Image& image, const Image& shown, const uint8_t* from,
                                 const int32_t* params, uint8_t* to) {
  const int64_t column = params[kColumn];
  const int64_t first = std::clamp<int64_t>(-column, 0, shown.width);
  const int64_t end = std::clamp<int64_t>(image.width - column, first, shown.width);
  const int64_t top = std::clamp<int64_t>(-int64_t{params[kRow]}, 0, shown.height);
  const int64_t bottom =
      std::clamp<int64_t>(image.height - int64_t{params[kRow]}, top, shown.height);
  const bool flip = params[kFlip] > 0;
  const int64_t line = shown.width * kChannels, count = end - first;
  if (top > 0 || bottom < shown.height || count < shown.width) std::memset(to, 0, shown.bytes());
  to += top * line + (flip ? shown.width - end : first) * kChannels;
  from += ((top + params[kRow]) * image.width + column + first) * kChannels;
  if (count == 0 || top == bottom) return;
  if (!flip && count == shown.width && count == image.width) {
    std::memcpy(to, from, (bottom - top) * line);
    return;
  }
  for (int64_t y = top; y < bottom; ++y, to += line, from += image.width * kChannels) {
    if (flip) {
      mirror<kChannels>(from, count, to);
    } else {
      std::memcpy(to, from, count * kChannels);
    }
  }
}

template <int kChannels, typename out_t>
void run(const Call& call, int64_t begin, int64_t end, const out_t* lut, out_t* out) {
  thread_local Scratch scratch;
  thread_local std::vector<uint8_t> cropped;
  const Normalizer& normalizer = Normalizer::of(lut, kChannels);
  const int64_t elements = call.shown.bytes();
  cropped.resize(elements);
  for (int64_t b = begin; b < end; ++b) {
    const int32_t* params = call.params + b * kParams;
    const uint8_t* source = call.images + params[kSource] * call.image.bytes();
    run_best([&]() FST_FAST_INLINE {
      const Mapped* patch = nullptr;
      if (params[kTrigger] >= 0) {
        const Mapped& mapped = call.mapped[params[kTrigger]];
        if (is_patch(call.tables, params, mapped)) {
          patch = &mapped;
        } else {
          source = triggered<kChannels>(call.image, call.tables, params, source, mapped, scratch);
        }
      }
      crop<kChannels>(call.image, call.shown, source, params, cropped.data());
      if (patch != nullptr) {
        patch_bytes<kChannels>(call.image, call.shown, call.tables, params, *patch, source,
                               cropped.data());
      }
    });
    out_t* to = out + b * elements;
    if constexpr (std::is_same_v<out_t, float>) {
      // Without a fused multiply-add in hardware it would be a function call.
      if (normalizer.linear && call.channels_last && instruction_set > 0) {
        run_best([&]() FST_FAST_INLINE { normalizer.vectors(cropped.data(), elements, to); });
        continue;
      }
    }
    look_up<kChannels>(cropped.data(), call.shown.pixels(), lut, call.channels_last, to);
  }
}

template <typename out_t>
void run_channels(const Call& call, int64_t begin, int64_t end, const out_t* lut, out_t* out) {
  switch (call.image.channels) {
    case 1:
      return run<1>(call, begin, end, lut, out);
    case 3:
      return run<3>(call, begin, end, lut, out);
    default:
      return run<4>(call, begin, end, lut, out);
  }
}

// Fresh memory comes in pages of 4 KiB, each of which costs more to get than to fill: asks for
// large ones, where the system leaves that to programs.
void want_large_pages(const at::Tensor& tensor) {
#ifdef __linux__
  constexpr size_t kWorthwhile = 8 << 20;
  if (tensor.nbytes() < kWorthwhile) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + tensor.nbytes()) / page * page;
  // Where it is refused, everything works as before.
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

std::tuple<at::Tensor, at::Tensor> inject_cpu(const at::Tensor& images, const at::Tensor& params,
                                              const at::Tensor& lut, const at::Tensor& table,
                                              const at::Tensor& noise, const at::Tensor& patterns,
                                              const at::Tensor& maps, const at::Tensor& sources,
                                              const at::Tensor& coords, const at::Tensor& lookup,
                                              int64_t height, int64_t width, bool channels_last) {
  const int64_t batch = params.size(0), channels = images.size(3);
  const auto layout = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor out = at::empty({batch, channels, height, width}, lut.options(), layout);
  at::Tensor labels = at::empty({batch}, params.options().dtype(at::kLong));
  if (batch == 0) return {out, labels};
  want_large_pages(out);
  Call call;
  call.image = {static_cast<int>(images.size(1)), static_cast<int>(images.size(2)),
                static_cast<int>(channels)};
  call.shown = {static_cast<int>(height), static_cast<int>(width), static_cast<int>(channels)};
  call.images = images.const_data_ptr<uint8_t>();
  call.image_count = images.size(0);
  call.params = params.const_data_ptr<int32_t>();
  call.tables = tables_of(table, noise, patterns, maps, sources, coords, lookup);
  call.channels_last = channels_last;
  check_rows(call, batch);
  auto* label = labels.mutable_data_ptr<int64_t>();
  double work = 0;  // in bytes without a trigger
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* row = call.params + b * kParams;
    label[b] = row[kLabel];
    work += cost(call, row) * call.shown.bytes();
  }
  const auto grain = std::max<int64_t>(1, static_cast<int64_t>(batch * kGrainBytes / work));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, lut.scalar_type(), "inject", [&] {
    const auto* levels = lut.const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      run_channels(call, begin, end, levels, to);
    });
  });
  return {out, labels};
}

}  // namespace

TORCH_LIBRARY_IMPL(fst_fast_native, CPU, m) { m.impl("inject", &inject_cpu); }

}  // namespace fst_fast
