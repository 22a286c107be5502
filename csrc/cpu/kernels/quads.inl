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

// A tile's vectors, as they lie in memory.
struct Vectors {
  const std::uint8_t* w;

  Bytes next(int) {
    prefetch(w + kPrefetchQuant);
    const Bytes v = load_bytes(w);
    w += 64;
    return v;
  }
};

// One unit for NB batch rows. from: the tiles' vectors; its next(i) gives the i-th of the next 32 columns.
template <typename E, int NB, typename From>
inline void quads_sums(const LinearJob& job, std::int64_t tile, std::int64_t b0, const From (&from)[kQuantTiles]) {
  constexpr int NT = kQuantTiles;
  const std::int64_t tiles = ceil_div(job.rows, kTileRows), groups = job.kpad / job.x_group;
  const std::int64_t weight_groups = ceil_div(job.kpad, job.group);
  From w[NT];
  const std::uint16_t *scales[NT], *minimums[NT];
  for (int t = 0; t < NT; ++t) {
    const std::int64_t at = (tile + t < tiles ? tile + t : tile) * weight_groups * kTileRows;
    w[t] = from[t];
    scales[t] = job.scales + at;
    minimums[t] = job.minimums ? job.minimums + at : nullptr;
  }
  const BytesBlock x = bytes_block(const_cast<void*>(job.panel), job.batch, job.kpad, groups, b0, NB);

  Vec sums[NT][NB];
  for (auto& tile_sums : sums) {
    for (auto& s : tile_sums) s = zero();
  }
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t k0 = g * job.x_group;
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
        for (int t = 0; t < NT; ++t) v[t] = w[t].next(i / (4 * E::kQuads));
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
#pragma GCC unroll 2
  for (int t = 0; t < NT; ++t) {
    if (tile + t < tiles) store_sums<NB>(job, tile + t, b0, sums[t], 1.0f);
  }
}

template <typename E, int NB>
inline void quads_block(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
  const std::int64_t tiles = ceil_div(job.rows, kTileRows);
  const auto* first = static_cast<const std::uint8_t*>(job.values);
  Vectors vectors[kQuantTiles];
  for (int t = 0; t < kQuantTiles; ++t) {  // a last tile without a partner meets itself
    vectors[t] = {first + (tile + t < tiles ? tile + t : tile) * Quads<E>::tile_bytes(job.kpad)};
  }
  const std::int64_t last = tile + 2 * kQuantTiles - 1;  // of the next unit
  if (kQuantTiles > 1 && last < tiles) prefetch_start(first + last * Quads<E>::tile_bytes(job.kpad));
  quads_sums<E, NB>(job, tile, b0, vectors);
}
