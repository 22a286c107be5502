// Linear over `bitquads` weights: any zero pattern, int8 or int4 values, one scale per group of columns.
//
//   out[b][row] = sum_g scale[row][g] * xscale[b][g] * sum_{kept k in g} value[row][k] * q[b][k]
//
// Weights: masks, 64 bits for 4 columns of a tile, and streams of kept values, one of bytes (int8) or two of nibbles (int4);
//          offsets: the byte at which a tile's begin. One instruction puts a mask's values in their places, which gives a
//          vector of 4 columns of 16 rows in bytes, as quads.inl reads them. scales: [groups][16] of a tile.
// Panel:   as for quads.
// Preconditions: as for quads.
// Work partition: as for quads. Where expanding is one instruction (AVX-512), it costs about as much as the products with four
//          batch rows, and doing it again for every block of them is faster than to write vectors and read them again. Other
//          levels decode a unit's tiles once (kExpandOnce), and the blocks of batch rows meet them in L2.

// What quads.inl multiplies, decoded from a tile's masks and values.
template <typename E>
struct BitVectors {
  const std::uint8_t* masks;
  const std::uint8_t* values[2];  // what is next of the low nibbles, or of the bytes; of the high nibbles

  static BitVectors of(const LinearJob& job, std::int64_t tile) {
    const std::uint8_t* first = static_cast<const std::uint8_t*>(job.values) + job.offsets[tile];
    return {static_cast<const std::uint8_t*>(job.index) + tile * job.kpad * 2, {first, first}};
  }
  // The i-th of 32 columns.
  Bytes next(int i) {
    const bool high = E::kBits == 4 && bitquads::is_high(i);
    if (i == 0) prefetch(masks + kPrefetchQuant);
    prefetch(values[high] + kPrefetchQuant);
    std::uint64_t mask;
    std::memcpy(&mask, masks, 8);
    masks += 8;
    const Bytes vector = E::expand(values[high], mask, high);
    values[high] += __builtin_popcountll(mask);
    return vector;
  }
};

template <typename E, int NB>
inline void bitquads_block(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
  const std::int64_t tiles = ceil_div(job.rows, kTileRows);
  BitVectors<E> vectors[kQuantTiles];
  for (int t = 0; t < kQuantTiles; ++t) vectors[t] = BitVectors<E>::of(job, tile + t < tiles ? tile + t : tile);
  const std::int64_t last = tile + 2 * kQuantTiles - 1;  // of the next unit
  if (kQuantTiles > 1 && last < tiles) {
    const BitVectors<E> start = BitVectors<E>::of(job, last);
    prefetch_start(start.masks);
    prefetch_start(start.values[0]);
  }
  quads_sums<E, NB>(job, tile, b0, vectors);
}

// A unit that is decoded.
template <typename E>
struct DecodedQuads {
  const std::uint8_t* tiles[kQuantTiles];

  template <int NB>
  void block(const LinearJob& job, std::int64_t tile, std::int64_t b0) const {
    Vectors vectors[kQuantTiles];
    for (int t = 0; t < kQuantTiles; ++t) vectors[t] = {tiles[t]};
    quads_sums<E, NB>(job, tile, b0, vectors);
  }
};

inline bool decodes_once(const LinearJob& job) {
  return kExpandOnce && job.batch > job.block;
}
inline std::size_t bitquads_scratch(const LinearJob& job) {
  return decodes_once(job) ? static_cast<std::size_t>(kQuantTiles * kTileRows * job.kpad) : 0;
}

template <typename E>
void bitquads_rows(const LinearJob& job, std::int64_t begin, std::int64_t end, void* scratch) {
  if (!decodes_once(job)) return quant_rows<Bitquads<E>>(job, begin, end, scratch);
  const std::int64_t tiles = ceil_div(job.rows, kTileRows);
  for (std::int64_t tile = begin * kQuantTiles; tile < tiles && tile < end * kQuantTiles; tile += kQuantTiles) {
    DecodedQuads<E> decoded;
    auto* out = static_cast<std::uint8_t*>(scratch);
    for (int t = 0; t < kQuantTiles; ++t) {
      decoded.tiles[t] = out;
      BitVectors<E> vectors = BitVectors<E>::of(job, tile + t < tiles ? tile + t : tile);
      for (std::int64_t k = 0; k < job.kpad; k += 32) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i, out += 64) store_bytes(out, vectors.next(i));
      }
    }
    for (std::int64_t b = 0; b < job.batch; b += job.block) {
      quant_sized<kQuantBatch>(decoded, job, tile, b, job.batch - b < job.block ? job.batch - b : job.block);
    }
  }
}
