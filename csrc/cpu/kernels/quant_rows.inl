// What the kernels of codes share: the walk over tiles and blocks of batch rows, the outputs, the table. First of them.

// Reading ahead in the last tile of a unit reaches the first of the next; that unit's last one, `tile`, begins elsewhere.
inline void prefetch_start(const std::uint8_t* tile) {
  for (std::int64_t i = 0; i < kPrefetchQuant; i += 64) prefetch(tile + i);
}

template <typename E, int NB>
inline void quads_block(const LinearJob& job, std::int64_t tile, std::int64_t b0);
template <typename E, int NB>
inline void octets_block(const LinearJob& job, std::int64_t tile, std::int64_t b0);
template <typename E, int NB>
inline void bitquads_block(const LinearJob& job, std::int64_t tile, std::int64_t b0);
template <typename E>
void bitquads_rows(const LinearJob& job, std::int64_t begin, std::int64_t end, void* scratch);
inline std::size_t bitquads_scratch(const LinearJob& job);

template <typename E>
struct Quads {
  static constexpr std::int64_t tile_bytes(std::int64_t kpad) {
    return kpad / (4 * E::kQuads) * 64;
  }
  template <int NB>
  static void block(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
    quads_block<E, NB>(job, tile, b0);
  }
};
template <typename E>
struct Octets {
  static constexpr std::int64_t tile_bytes(std::int64_t kpad) {
    return kpad / 32 * E::kBytes;
  }
  template <int NB>
  static void block(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
    octets_block<E, NB>(job, tile, b0);
  }
};

template <typename E>
struct Bitquads {
  static constexpr std::int64_t tile_bytes(std::int64_t kpad) {
    return kpad * (2 + E::kBits);  // where half is kept
  }
  template <int NB>
  static void block(const LinearJob& job, std::int64_t tile, std::int64_t b0) {
    bitquads_block<E, NB>(job, tile, b0);
  }
};

template <typename T, int NB>
inline void store_sums_as(const LinearJob& job, std::int64_t tile, std::int64_t b0, const Vec (&sums)[NB], float unit) {
  const std::int64_t row = tile * kTileRows;
  const int n = static_cast<int>(job.rows - row < kTileRows ? job.rows - row : kTileRows);
  const Vec bias = job.bias ? load_n(static_cast<const T*>(job.bias) + row, n) : zero();
  for (int b = 0; b < NB; ++b) {
    store_n(static_cast<T*>(job.out) + (b0 + b) * job.rows + row, fma(sums[b], broadcast(unit), bias), n);
  }
}
template <int NB>
inline void store_sums(const LinearJob& job, std::int64_t tile, std::int64_t b0, const Vec (&sums)[NB], float unit) {
  switch (job.dtype) {
    case DType::f32: return store_sums_as<float>(job, tile, b0, sums, unit);
    case DType::bf16: return store_sums_as<bf16>(job, tile, b0, sums, unit);
    case DType::f16: return store_sums_as<f16>(job, tile, b0, sums, unit);
  }
}

template <int NB, typename F>
inline void quant_sized(const F& format, const LinearJob& job, std::int64_t tile, std::int64_t b0, std::int64_t nb) {
  if (nb == NB) {
    format.template block<NB>(job, tile, b0);
  } else if constexpr (NB > 1) {
    quant_sized<NB - 1>(format, job, tile, b0, nb);
  }
}

// So many bytes of weights stay in L2 and meet one block of batch rows after the other.
constexpr std::int64_t kQuantGroupBytes = 1 << 18;

template <typename F>
void quant_rows(const LinearJob& job, std::int64_t begin, std::int64_t end, void*) {
  const std::int64_t tiles = ceil_div(job.rows, kTileRows);
  const std::int64_t last = end * kQuantTiles < tiles ? end * kQuantTiles : tiles;
  const std::int64_t fits = kQuantGroupBytes / (F::tile_bytes(job.kpad) * kQuantTiles);
  const std::int64_t group = (fits < 1 ? 1 : fits) * kQuantTiles;
  for (std::int64_t t0 = begin * kQuantTiles; t0 < last; t0 += group) {
    const std::int64_t t1 = t0 + group < last ? t0 + group : last;
    for (std::int64_t b = 0; b < job.batch; b += job.block) {
      const std::int64_t nb = job.batch - b < job.block ? job.batch - b : job.block;
      for (std::int64_t t = t0; t < t1; t += kQuantTiles) quant_sized<kQuantBatch>(F{}, job, t, b, nb);
    }
  }
}

inline std::size_t no_quant_scratch(const LinearJob&) {
  return 0;
}

template <typename T>
inline void install_quant_type(KernelTable& table) {
  constexpr DType dtype = dtype_of<T>::value;
  const auto set = [&](Strategy s, Encoding encoding, LinearFn run, int zero, std::uint8_t flip) {
    const auto scratch = s == Strategy::bitquads_rows ? bitquads_scratch : no_quant_scratch;
    kernel_of(table, s, encoding, dtype) = {Panel::bytes, kQuantTiles * kTileRows, kQuantBatch, 1, scratch, run, zero, flip};
  };
  set(Strategy::quads_rows, Encoding::int8, quant_rows<Quads<QuadInt8>>, QuadInt8::kZero, 0);
  set(Strategy::quads_rows, Encoding::int4, quant_rows<Quads<QuadInt4>>, QuadInt4::kZero, 0);
  set(Strategy::quads_rows, Encoding::int4_minimum, quant_rows<Quads<QuadInt4>>, 0, 0);
  set(Strategy::octets_rows, Encoding::int8, quant_rows<Octets<OctetInt8>>, 0, OctetInt8::kFlip);
  set(Strategy::octets_rows, Encoding::int4, quant_rows<Octets<OctetInt4>>, 0, OctetInt4::kFlip);
  set(Strategy::bitquads_rows, Encoding::int8, bitquads_rows<BitInt8>, BitInt8::kZero, 0);
  set(Strategy::bitquads_rows, Encoding::int4, bitquads_rows<BitInt4>, BitInt4::kZero, 0);
  table.panel[static_cast<int>(Panel::bytes)][static_cast<int>(dtype)] = pack_bytes<T>;
}

// For every level that has quant.h, last in its table.
inline void install_quant(KernelTable& table) {
  install_quant_type<float>(table);
  install_quant_type<bf16>(table);
  install_quant_type<f16>(table);
}
