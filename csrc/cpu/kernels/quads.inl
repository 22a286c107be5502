// Linear over `quads` weights: dense, int8 or int4 codes, one scale (and minimum) a group of columns.
//
//   out[b][row] = sum_g scale[row][g] * xscale[b][g] * sum_{k in g} (code[row][k] - zero) * q[b][k]
//               (+ sum_g minimum[row][g] * xscale[b][g] * sum_{k in g} q[b][k]      and zero = 0, where there are minimums)
//
// Weights: vectors of 64 bytes, 4 a row of the tile. int8: a row's bytes are 4 columns of value + 128. int4: the low
//          nibbles are 4 columns, the high ones the next 4. scales, minimums: [groups][16] of a tile.
// Panel:   signed bytes (bytes_panel.inl). `starts` takes the zero point out of the sums before they begin.
// Preconditions: kpad is a multiple of 64; an activation group, 32 or 64 columns, lies within a weight's group.
// Work partition: a unit is kQuantTiles tiles, which share each broadcast of 4 activations. A vector meets NB batch rows
//          and the sums of a group are exact. Decoding costs 3 cheap instructions for 16 * NB products, less than
//          writing and reading expanded weights: many batch rows are served block after block (quant_rows.inl).

// Where the tiles of a unit are read: the vectors of their next columns, and what belongs to these columns' group.
struct QuadsPlace {
  const std::uint8_t* w[kQuantTiles];
  const std::uint16_t *scales[kQuantTiles], *minimums[kQuantTiles];
};

// Adds columns [begin, end), whole groups, to the sums of NB batch rows.
template <typename E, int NB>
inline void add_quads(const LinearJob& job, const BytesBlock& x, std::int64_t begin, std::int64_t end,
                      const QuadsPlace& place, Vec (&sums)[kQuantTiles][NB]) {
  constexpr int NT = kQuantTiles;
  const std::uint8_t* w[NT];
  const std::uint16_t *scales[NT], *minimums[NT];
  for (int t = 0; t < NT; ++t) w[t] = place.w[t], scales[t] = place.scales[t], minimums[t] = place.minimums[t];
  std::int64_t g = begin / job.x_group;
  for (std::int64_t k0 = begin; k0 < end; k0 += job.x_group, ++g) {
    Ints acc[NT][NB];
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) {
#pragma GCC unroll 2
      for (int t = 0; t < NT; ++t) acc[t][b] = broadcast_int(x.starts[g * NB + b]);
    }
#pragma GCC unroll 1
    for (std::int64_t k = k0; k < k0 + job.x_group; k += 32) {
      const std::uint8_t* columns = x.bytes + k / 64 * 64 * NB + k % 64;
      typename E::Part part[NT][NB];
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b) {
#pragma GCC unroll 2
        for (int t = 0; t < NT; ++t) part[t][b] = E::open(acc[t][b]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 32; i += 4 * E::kQuads) {
        Bytes v[NT];
#pragma GCC unroll 2
        for (int t = 0; t < NT; ++t) {
          prefetch(w[t] + kPrefetchQuant);
          v[t] = load_bytes(w[t]);
          w[t] += 64;
        }
#pragma GCC unroll 2
        for (int q = 0; q < E::kQuads; ++q) {
          Bytes codes[NT];
#pragma GCC unroll 2
          for (int t = 0; t < NT; ++t) codes[t] = E::codes(v[t], q);
#pragma GCC unroll 8
          for (int b = 0; b < NB; ++b) {
            const auto quad = broadcast_quad(columns + 64 * b + i + 4 * q);
#pragma GCC unroll 2
            for (int t = 0; t < NT; ++t) part[t][b] = E::dot(part[t][b], codes[t], quad);
          }
        }
      }
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b) {
#pragma GCC unroll 2
        for (int t = 0; t < NT; ++t) acc[t][b] = E::close(acc[t][b], part[t][b]);
      }
    }
    const std::int64_t next = ((k0 + job.x_group) & (job.group - 1)) == 0 ? kTileRows : 0;
#pragma GCC unroll 2
    for (int t = 0; t < NT; ++t) {
      const Vec scale = load_scales(scales[t], job.scale_dtype);
      scales[t] += next;
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b) {
        sums[t][b] = add_product(sums[t][b], multiply(to_floats(acc[t][b]), broadcast(x.scales[g * NB + b])), scale);
      }
      if (minimums[t]) {
        const Vec minimum = load_scales(minimums[t], job.scale_dtype);
        minimums[t] += next;
#pragma GCC unroll 8
        for (int b = 0; b < NB; ++b) sums[t][b] = fma(minimum, broadcast(x.sums[g * NB + b]), sums[t][b]);
      }
    }
  }
}

template <typename E, int NB>
inline void quads_block(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
  constexpr int NT = kQuantTiles;
  const std::int64_t tiles = ceil_div(job.rows, kTileRows), groups = job.kpad / job.x_group;
  const std::int64_t weight_groups = ceil_div(job.kpad, job.group);
  QuadsPlace place;
  for (int t = 0; t < NT; ++t) {
    const std::int64_t at = tile + t < tiles ? tile + t : tile;  // a last tile without a partner meets itself
    place.w[t] = static_cast<const std::uint8_t*>(job.values) + at * Quads<E>::tile_bytes(job.kpad);
    place.scales[t] = job.scales + at * weight_groups * kTileRows;
    place.minimums[t] = job.minimums ? job.minimums + at * weight_groups * kTileRows : nullptr;
  }
  Vec sums[NT][NB];
  for (auto& tile_sums : sums) {
    for (auto& s : tile_sums) s = zero();
  }
  add_quads<E, NB>(job, bytes_block(const_cast<void*>(job.panel), job.batch, job.kpad, groups, b0, NB), 0, job.kpad, place,
                   sums);
#pragma GCC unroll 2
  for (int t = 0; t < NT; ++t) {
    if (tile + t < tiles) store_sums<NB>(job, tile + t, b0, sums[t], 1.0f);
  }
}
