// Linear over `octets` weights: 2:4, int8 or int4 values, one scale per group of columns.
//
//   out[b][row] = sum_g scale[row][g] * xscale[b][g] * sum_{kept k in g} value[row][k] * q[b][k]
//
// Weights: for every 32 columns, 64 bytes of places, 4 a row: bits 2j and 2j + 1 of byte i say where in its 4 columns
//          the i-th kept value of octet j (8 columns, 4 values) lies; i 0 and 1 in the first 4 columns, 2 and 3 in the
//          others. Then values, vectors of 64 bytes, 4 a row: an octet each (int8), or the octets j and j + 1 as low
//          and high nibbles of value + 8 (int4). scales: [groups][16] of a tile.
// Panel:   bytes (bytes_panel.inl). A level that multiplies by unsigned activations takes q + 128 and subtracts
//          128 * sum(values), which it finds by one product more for all batch rows.
// Preconditions: as for quads.
// Work partition: as for quads. A shift and a mask make an index of the places, a byte permutation picks for 16 rows the
//          4 activations that their values meet, one instruction multiplies and adds the four: half of the products of
//          a dense weight. For many batch rows too, decoding again beats reading decoded weights from memory.

// kHalf: whether an activation group is 32 columns, not 64.
template <typename E, int NB, bool kHalf>
inline void octets_sums(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
  constexpr int NT = kQuantTiles;
  const std::int64_t tiles = ceil_div(job.rows, kTileRows), groups = job.kpad / job.x_group;
  const std::int64_t weight_groups = ceil_div(job.kpad, job.group);
  const std::uint8_t* w[NT];
  const std::uint16_t* scales[NT];
  for (int t = 0; t < NT; ++t) {
    const std::int64_t at = tile + t < tiles ? tile + t : tile;
    w[t] = static_cast<const std::uint8_t*>(job.values) + at * Octets<E>::tile_bytes(job.kpad);
    scales[t] = job.scales + at * weight_groups * kTileRows;
  }
  const std::int64_t last = tile + 2 * NT - 1;  // of the next unit
  if (NT > 1 && last < tiles) {
    prefetch_start(static_cast<const std::uint8_t*>(job.values) + last * Octets<E>::tile_bytes(job.kpad));
  }
  const BytesBlock x = bytes_block(const_cast<void*>(job.panel), job.batch, job.kpad, groups, b0, NB);

  Vec sums[NT][NB];
  for (auto& tile_sums : sums) {
    for (auto& s : tile_sums) s = zero();
  }
  Ints acc[NT][NB], offset[NT];
  std::int64_t g = 0;
  for (std::int64_t k = 0; k < job.kpad; k += 64) {
    const std::uint8_t* columns = x.bytes + k * NB;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if (half == 0 || kHalf) {
#pragma GCC unroll 2
        for (int t = 0; t < NT; ++t) {
          offset[t] = broadcast_int(0);
#pragma GCC unroll 8
          for (int b = 0; b < NB; ++b) acc[t][b] = broadcast_int(0);
        }
      }
#pragma GCC unroll 2
      for (int t = 0; t < NT; ++t) {
#pragma GCC unroll 5
        for (int line = 0; line < E::kBytes; line += 64) prefetch(w[t] + kPrefetchQuant + line);
        const Bytes places = load_bytes(w[t]);
        const typename E::Values values = E::load(w[t] + 64);
        w[t] += E::kBytes;
        typename E::Part part[NB], offset_part = E::open(offset[t]);
#pragma GCC unroll 8
        for (int b = 0; b < NB; ++b) part[b] = E::open(acc[t][b]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const auto index = pick_index(places, half, j);
          const auto v = E::octet(values, j);
          offset_part = E::offset(offset_part, v);
#pragma GCC unroll 8
          for (int b = 0; b < NB; ++b) part[b] = E::dot(part[b], v, pick(columns + 64 * b, half, j, index));
        }
        offset[t] = E::close(offset[t], offset_part);
#pragma GCC unroll 8
        for (int b = 0; b < NB; ++b) acc[t][b] = E::close(acc[t][b], part[b]);
      }
      if (half == 1 || kHalf) {
        const std::int64_t next = ((k + 32 * half + 32) & (job.group - 1)) == 0 ? kTileRows : 0;
#pragma GCC unroll 2
        for (int t = 0; t < NT; ++t) {
          const Vec scale = load_scales(scales[t], job.scale_dtype);
          scales[t] += next;
#pragma GCC unroll 8
          for (int b = 0; b < NB; ++b) {
            const Vec sum = to_floats(subtract(acc[t][b], offset[t]));
            sums[t][b] = add_product(sums[t][b], multiply(sum, broadcast(x.scales[g * NB + b])), scale);
          }
        }
        ++g;
      }
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < NT; ++t) {
    if (tile + t < tiles) store_sums<NB>(job, tile + t, b0, sums[t], E::kUnit);
  }
}

template <typename E, int NB>
inline void octets_block(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
  job.x_group == 32 ? octets_sums<E, NB, true>(job, tile, b0) : octets_sums<E, NB, false>(job, tile, b0);
}
