// Linear over `bitquads` weights: any zero pattern, int8 or int4 values, one scale per group of columns.
//
//   out[b][row] = sum_g scale[row][g] * xscale[b][g] * sum_{kept k in g} value[row][k] * q[b][k]
//
// Weights: masks, 64 bits for 4 columns of a tile, and the kept values in the order of the bits, chunk by chunk of 256
//          columns: bytes (int8), or nibbles (int4), the first half of a chunk's values in the low ones. offsets: the byte
//          at which a tile's values begin. scales: [groups][16] of a tile.
// Panel:   as for quads.
// Preconditions: as for quads; a chunk is whole groups.
// Work partition: as for quads, but chunk by chunk: the values of kQuantTiles tiles are decoded to L1, as vectors that hold
//          4 columns of 16 rows in bytes, and meet all batch rows there, block after block. Nibbles become bytes first, so
//          that one instruction puts the values of a mask in place. Even for one batch row it is not slower to write
//          vectors and read them again than to multiply them at once: memory is what that waits for.

constexpr std::int64_t kBitBatch = 512;  // batch rows whose sums a thread keeps, 32 or 64 KB: they stay in L2

struct alignas(64) BitScratch {
  std::uint8_t values[bitquads::kChunkMasks * 64 + 64];  // of a chunk, as bytes; a vector may be read at their end
  std::uint8_t vectors[kQuantTiles][bitquads::kChunkMasks * 64];
  float sums[kBitBatch][kQuantTiles][16];  // as many as there are batch rows
};
inline std::size_t bitquads_scratch(const LinearJob& job) {
  const std::int64_t batch = job.batch < kBitBatch ? job.batch : kBitBatch;
  return sizeof(BitScratch) - static_cast<std::size_t>(kBitBatch - batch) * sizeof(BitScratch::sums[0]);
}

inline std::uint64_t load_mask(const std::uint8_t* masks, std::int64_t i) {
  std::uint64_t mask;
  std::memcpy(&mask, masks + 8 * i, 8);
  return mask;
}
inline std::int64_t popcount64(std::uint64_t mask) {
  return __builtin_popcountll(mask);
}

// A chunk of `count` masks; returns where the next one's values begin.
template <typename E>
inline const std::uint8_t* decode_chunk(const std::uint8_t* masks, std::int64_t count, const std::uint8_t* values,
                                        std::uint8_t* bytes, std::uint8_t* vectors) {
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < count; ++i) kept += popcount64(load_mask(masks, i));
  const std::int64_t size = bitquads::chunk_bytes(E::kBits, kept);
  const std::uint8_t* next = values;
  if constexpr (E::kBits == 4) {
    for (std::int64_t i = 0; i < size; i += 64) {
      prefetch(values + kPrefetchQuant + i);
      store_bytes(bytes + i, E::nibbles(load_bytes(values + i), false));
    }
    // Over what the last vector of low nibbles has too much.
    for (std::int64_t i = 0; i < size; i += 64) store_bytes(bytes + size + i, E::nibbles(load_bytes(values + i), true));
    next = bytes;
  }
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < count; ++i) {
    if (E::kBits == 8) prefetch(next + kPrefetchQuant);
    if (i % 8 == 0) prefetch(masks + 8 * i + kPrefetchQuant);
    const std::uint64_t mask = load_mask(masks, i);
    store_bytes(vectors + 64 * i, E::expand(next, mask));
    next += popcount64(mask);
  }
  return values + size;
}

// Columns [begin, end) of a unit, decoded.
template <typename E>
struct BitChunk {
  std::int64_t begin, end, first;  // first: batch row whose sums lie at the front of scratch
  const std::uint8_t* vectors[kQuantTiles];
  const std::uint16_t* scales[kQuantTiles];
  float (*sums)[kQuantTiles][16];

  template <int NB>
  void block(const LinearJob& job, std::int64_t tile, std::int64_t b0) const {
    constexpr int NT = kQuantTiles;
    float (*own)[NT][16] = sums + (b0 - first);
    Vec acc[NT][NB];
    QuadsPlace place;
    for (int t = 0; t < NT; ++t) {
      place.w[t] = vectors[t], place.scales[t] = scales[t], place.minimums[t] = nullptr;
      for (int b = 0; b < NB; ++b) acc[t][b] = begin == 0 ? zero() : load(own[b][t]);
    }
    const BytesBlock x = bytes_block(const_cast<void*>(job.panel), job.batch, job.kpad, job.kpad / job.x_group, b0, NB);
    add_quads<E, NB>(job, x, begin, end, place, acc);
    for (int t = 0; t < NT; ++t) {
      if (end < job.kpad) {
        for (int b = 0; b < NB; ++b) store(own[b][t], acc[t][b]);
      } else if ((tile + t) * kTileRows < job.rows) {
        store_sums<NB>(job, tile + t, b0, acc[t], 1.0f);
      }
    }
  }
};

template <typename E>
void bitquads_rows(const LinearJob& job, std::int64_t begin, std::int64_t end, void* scratch) {
  auto& own = *static_cast<BitScratch*>(scratch);
  const std::int64_t tiles = ceil_div(job.rows, kTileRows), weight_groups = ceil_div(job.kpad, job.group);
  const std::int64_t at_once = kBitBatch / job.block * job.block;
  for (std::int64_t tile = begin * kQuantTiles; tile < tiles && tile < end * kQuantTiles; tile += kQuantTiles) {
    for (std::int64_t first = 0; first < job.batch; first += at_once) {
      const std::int64_t last = job.batch - first < at_once ? job.batch : first + at_once;
      const std::uint8_t *masks[kQuantTiles], *values[kQuantTiles];
      for (int t = 0; t < kQuantTiles; ++t) {
        const std::int64_t at = tile + t < tiles ? tile + t : tile;  // a last tile without a partner meets itself
        masks[t] = static_cast<const std::uint8_t*>(job.index) + at * job.kpad * 2;
        values[t] = static_cast<const std::uint8_t*>(job.values) + job.offsets[at];
      }
      for (std::int64_t k = 0; k < job.kpad; k += bitquads::kChunkCols) {
        const std::int64_t cols = job.kpad - k < bitquads::kChunkCols ? job.kpad - k : bitquads::kChunkCols;
        BitChunk<E> chunk{k, k + cols, first, {}, {}, own.sums};
        for (int t = 0; t < kQuantTiles; ++t) {
          const std::int64_t at = tile + t < tiles ? tile + t : tile;
          values[t] = decode_chunk<E>(masks[t] + 2 * k, cols / 4, values[t], own.values, own.vectors[t]);
          chunk.vectors[t] = own.vectors[t];
          chunk.scales[t] = job.scales + (at * weight_groups + k / job.group) * kTileRows;
        }
        for (std::int64_t b = first; b < last; b += job.block) {
          quant_sized<kQuantBatch>(chunk, job, tile, b, last - b < job.block ? last - b : job.block);
        }
      }
    }
  }
}
