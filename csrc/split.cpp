#include "split.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <vector>

namespace curvfast {

Split cheapest_split(std::span<const std::int64_t> widths, std::int64_t columns, std::int64_t band) {
  if (widths.front() > columns || widths.back() < 0 ||
      !std::is_sorted(widths.begin(), widths.end(), std::greater<>()))
    throw std::invalid_argument("widths must fall from at most the columns to at least 0");
  if (band < 1) throw std::invalid_argument("band must be positive");
  const auto rows = static_cast<std::int64_t>(widths.size());
  const std::int64_t used = std::partition_point(widths.begin(), widths.end(),
                                                 [](std::int64_t w) { return w > 0; }) -
                            widths.begin();
  // How many rows keep column c, at the first column of each band.
  std::vector<std::int64_t> heights;
  for (std::int64_t c = 0, row = used; used && c < widths.front(); c += band) {
    while (widths[row - 1] <= c) --row;
    heights.push_back(row);
  }
  Split best{-1, 0, 0};
  std::int64_t above = 0;
  for (std::int64_t split = 0;; split = std::min(split + band, used)) {
    const std::int64_t reach = split < used ? widths[split] : 0;
    std::int64_t below = 0;
    for (std::int64_t c = 0; c < reach; c += band)
      below += (std::min(c + band, reach) - c) * (heights[c / band] - split);
    const std::int64_t flops =
        4 * (rows * columns * (split + reach) + columns * above + rows * below);
    if (best.flops < 0 || flops < best.flops) best = {flops, split, reach};
    if (split == used) return best;
    above += (std::min(split + band, used) - split) * widths[split];
  }
}

}  // namespace curvfast
