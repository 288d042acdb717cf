// Views and tilings.

#include "csrc/batch_norm/cuda/tiling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "csrc/batch_norm/virtual_batches.h"

namespace tfops::cuda {

View MakeView(const Problem& whole, bool aligned, int64_t most_units, bool fold_bits) {
  const Problem problem = OfVirtualBatch(whole);
  if (whole.virtual_batches > 1) aligned = aligned && problem.Elements() * ElementBytes(problem.dtype) % 16 == 0;
  const int lanes = 16 / ElementBytes(problem.dtype);
  View view;
  view.channels = view.units = problem.channels;
  const ActivationBitsLayout bits = LayoutOfActivationBits(problem);
  view.bits_row_elements = bits.row_elements;
  view.bits_row_bytes = bits.row_bytes;
  view.bits_bytes = bits.Bytes();
  const bool one_channel = problem.channels == 1;
  view.planes = one_channel || problem.inner > 1;
  view.outer = one_channel ? 1 : problem.outer;
  view.inner = one_channel ? problem.Elements() : problem.inner;
  if (!aligned) return view;

  const int64_t run = view.planes ? view.inner : view.units;
  if (run % lanes == 0) {
    view.lanes = lanes;
    return view;
  }
  if (one_channel || (NeedsActivationBits(problem) && !fold_bits)) return view;
  const int64_t row = problem.channels * problem.inner;
  const int64_t repeat = lanes / std::gcd(row, int64_t{lanes});
  if (row * repeat > most_units || view.outer % repeat != 0) return view;
  view.lanes = lanes;
  view.planes = false;
  view.outer /= repeat;
  view.inner = 1;
  view.units = row * repeat;
  view.repeat = static_cast<int>(repeat);
  view.pixels = static_cast<int>(problem.inner);
  return view;
}

bool AllAligned(const void* const* arrays, int count) {
  return std::all_of(arrays, arrays + count,
                     [](const void* array) { return reinterpret_cast<uintptr_t>(array) % 16 == 0; });
}

Tiling MakeTiling(const View& view, const Extent& block, int threads, bool by_channel) {
  Tiling tiling;
  static_cast<View&>(tiling) = view;
  tiling.block = block;
  const int64_t vectors = DivideUp(view.planes ? view.inner : view.units, view.lanes);
  tiling.slabs = view.planes ? DivideUp(view.units, block.y) : DivideUp(vectors, block.x);
  tiling.steps_across = static_cast<int>(view.planes ? DivideUp(vectors, block.x) : 1);
  tiling.steps = DivideUp(view.outer, block.z) * tiling.steps_across;
  tiling.stride_across = int64_t{block.x} * view.lanes;
  tiling.stride_down = block.z * view.RowElements() - (tiling.steps_across - 1) * tiling.stride_across;

  BlockSums& sums = tiling.sums;
  sums.units = view.planes ? block.y : block.x * view.lanes;
  sums.numbers = view.planes ? block.x * block.z : block.z;
  if (by_channel && view.Folded()) {
    sums.repeat = view.repeat;
    sums.pixels = view.pixels;
  }
  const int units_of_result = sums.repeat * sums.pixels;
  sums.results = sums.units / units_of_result;
  // The two sums, of numbers and then of parts, take the least time together if they are equally long.
  const double even = std::sqrt(static_cast<double>(sums.numbers) / units_of_result);
  sums.parts = std::clamp(static_cast<int>(std::lround(even)), 1, std::max(threads / sums.units, 1));
  return tiling;
}

}  // namespace tfops::cuda
