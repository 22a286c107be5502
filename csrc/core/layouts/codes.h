// What the layouts of int8 and int4 codes share: tiles of codes, then their scales, then their minimums.
#pragma once

#include "core/layouts/geometry.h"
#include "core/packing.h"

namespace sparseprune::codes {

constexpr std::int64_t kRows = 16;  // in a tile

// Groups of columns that have a scale, the padding's among them.
static constexpr std::int64_t groups(std::int64_t kpad, const Packing& p) {
  return ceil_div(kpad, p.group);
}

// Adds to a geometry that ends with its values the sections behind them.
static constexpr Geometry geometry(Geometry g, std::int64_t value_bytes, const Packing& p) {
  g.scales = round_up(g.values + value_bytes, kAlign);
  const std::int64_t end = round_up(g.scales + g.units * groups(g.kpad, p) * kRows * 2, kAlign);
  g.minimums = has_minimums(p.encoding) ? end : 0;
  g.total = g.minimums == 0 ? end : end + (end - g.scales);
  return g;
}

// Tiles of equal size, which need neither offsets nor an index.
static constexpr Geometry geometry(std::int64_t tiles, std::int64_t kpad, std::int64_t tile_bytes, const Packing& p) {
  Geometry g{};
  g.units = tiles;
  g.kpad = kpad;
  g.offsets = g.index = g.values = kHeaderBytes;
  return geometry(g, tiles * tile_bytes, p);
}

}  // namespace sparseprune::codes
