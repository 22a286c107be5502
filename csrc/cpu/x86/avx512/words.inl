// Words by mask registers: one mask bit an element, compress and expand in one instruction.

template <typename W>
struct Lanes;
template <>
struct Lanes<std::uint32_t> {
  static constexpr std::int64_t count = 16;
  using Mask = __mmask16;
  static Mask first(std::int64_t n) {
    return static_cast<Mask>(n >= 16 ? 0xffffu : (1u << n) - 1u);
  }
  static __m512i load(const std::uint32_t* p, Mask m) {
    return _mm512_maskz_loadu_epi32(m, p);
  }
  static void store(std::uint32_t* p, Mask m, __m512i a) {
    _mm512_mask_storeu_epi32(p, m, a);
  }
  static Mask nonzero(__m512i a) {
    return _mm512_test_epi32_mask(a, _mm512_set1_epi32(0x7fffffff));
  }
  static Mask bytes(const std::uint8_t* mask, Mask m) {
    const __m128i b = _mm_maskz_loadu_epi8(m, mask);
    return _mm_test_epi8_mask(b, b);
  }
};
template <>
struct Lanes<std::uint16_t> {
  static constexpr std::int64_t count = 32;
  using Mask = __mmask32;
  static Mask first(std::int64_t n) {
    return n >= 32 ? ~0u : (1u << n) - 1u;
  }
  static __m512i load(const std::uint16_t* p, Mask m) {
    return _mm512_maskz_loadu_epi16(m, p);
  }
  static void store(std::uint16_t* p, Mask m, __m512i a) {
    _mm512_mask_storeu_epi16(p, m, a);
  }
  static Mask nonzero(__m512i a) {
    return _mm512_test_epi16_mask(a, _mm512_set1_epi16(0x7fff));
  }
  static Mask bytes(const std::uint8_t* mask, Mask m) {
    const __m256i b = _mm256_maskz_loadu_epi8(m, mask);
    return _mm256_test_epi8_mask(b, b);
  }
};

// n is the number of elements left; reads ceil(n/8) bytes at most.
template <typename W>
inline typename Lanes<W>::Mask load_bits(const std::uint8_t* bits, std::int64_t n) {
  typename Lanes<W>::Mask m = 0;
  if (n >= Lanes<W>::count) {
    std::memcpy(&m, bits, sizeof m);
  } else {
    std::memcpy(&m, bits, static_cast<std::size_t>(ceil_div(n, 8)));
  }
  return m;
}
template <typename W>
inline void store_bits(std::uint8_t* bits, typename Lanes<W>::Mask m, std::int64_t n) {
  std::memcpy(bits, &m, static_cast<std::size_t>(n >= Lanes<W>::count ? Lanes<W>::count / 8 : ceil_div(n, 8)));
}

template <typename W>
void mask_bytes_lanes(const void* in, const std::uint8_t* mask, void* out, std::int64_t n) {
  using L = Lanes<W>;
  const W* x = static_cast<const W*>(in);
  W* y = static_cast<W*>(out);
  for (std::int64_t i = 0; i < n; i += L::count) {
    const auto m = L::first(n - i);
    L::store(y + i, m, L::load(x + i, L::bytes(mask + i, m)));
  }
}

template <typename W>
void mask_bits_lanes(const void* in, const std::uint8_t* bits, void* out, std::int64_t n) {
  using L = Lanes<W>;
  const W* x = static_cast<const W*>(in);
  W* y = static_cast<W*>(out);
  for (std::int64_t i = 0; i < n; i += L::count) {
    const auto m = L::first(n - i);
    L::store(y + i, m, L::load(x + i, load_bits<W>(bits + i / 8, n - i) & m));
  }
}

template <typename W>
std::int64_t scan_lanes(const void* in, std::uint8_t* bits, std::int64_t n) {
  using L = Lanes<W>;
  const W* x = static_cast<const W*>(in);
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < n; i += L::count) {
    const auto m = L::nonzero(L::load(x + i, L::first(n - i)));
    store_bits<W>(bits + i / 8, m, n - i);
    kept += popcount(m);
  }
  return kept;
}

template <typename W>
std::int64_t count_lanes(const void* in, std::int64_t n) {
  using L = Lanes<W>;
  const W* x = static_cast<const W*>(in);
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < n; i += L::count) kept += popcount(L::nonzero(L::load(x + i, L::first(n - i))));
  return kept;
}

inline void compress32(const void* in, const std::uint8_t* bits, void* out, std::int64_t n) {
  using L = Lanes<std::uint32_t>;
  const auto* x = static_cast<const std::uint32_t*>(in);
  auto* y = static_cast<std::uint32_t*>(out);
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = load_bits<std::uint32_t>(bits + i / 8, n - i);
    const int kept = popcount(m);
    L::store(y, L::first(kept), _mm512_maskz_compress_epi32(m, L::load(x + i, L::first(n - i))));
    y += kept;
  }
}

inline void expand32(const void* values, const std::uint8_t* bits, void* out, std::int64_t n) {
  using L = Lanes<std::uint32_t>;
  const auto* x = static_cast<const std::uint32_t*>(values);
  auto* y = static_cast<std::uint32_t*>(out);
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = load_bits<std::uint32_t>(bits + i / 8, n - i);
    const int kept = popcount(m);
    L::store(y + i, L::first(n - i), _mm512_maskz_expand_epi32(m, L::load(x, L::first(kept))));
    x += kept;
  }
}

inline void csr_row32(const void* in, std::int32_t* cols, void* values, std::int64_t n) {
  using L = Lanes<std::uint32_t>;
  const auto* x = static_cast<const std::uint32_t*>(in);
  auto* y = static_cast<std::uint32_t*>(values);
  __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (std::int64_t i = 0; i < n; i += 16) {
    const __m512i words = L::load(x + i, L::first(n - i));
    const __mmask16 m = L::nonzero(words);
    const int kept = popcount(m);
    // Masked stores write exactly the kept elements: what follows belongs to the next row, another thread's.
    L::store(y, L::first(kept), _mm512_maskz_compress_epi32(m, words));
    _mm512_mask_storeu_epi32(cols, L::first(kept), _mm512_maskz_compress_epi32(m, column));
    column = _mm512_add_epi32(column, _mm512_set1_epi32(16));
    y += kept;
    cols += kept;
  }
}

template <typename T, typename W>
void threshold_lanes(const void* in, float limit, void* out, std::uint8_t* bits, std::int64_t n) {
  const T* x = static_cast<const T*>(in);
  const auto* words = static_cast<const W*>(in);
  auto* y = static_cast<W*>(out);
  using L = Lanes<W>;
  const __m512 bound = broadcast(limit);
  for (std::int64_t i = 0; i < n; i += L::count) {
    typename L::Mask kept = 0;
    for (int j = 0; j < L::count && i + j < n; j += 16) {
      const int left = static_cast<int>(n - i - j < 16 ? n - i - j : 16);
      const __m512 value = _mm512_abs_ps(load_n(x + i + j, left));
      // Not "greater than": NaN is kept.
      const auto m = static_cast<__mmask16>(_mm512_cmp_ps_mask(value, bound, _CMP_NLE_UQ) & first(left));
      kept |= static_cast<typename L::Mask>(static_cast<std::uint32_t>(m) << j);
    }
    L::store(y + i, L::first(n - i), L::load(words + i, kept));
    store_bits<W>(bits + i / 8, kept, n - i);
  }
}

inline void install_words(KernelTable& table) {
  WordKernels& w32 = table.words32;
  w32.mask_bytes = mask_bytes_lanes<std::uint32_t>;
  w32.mask_bits = mask_bits_lanes<std::uint32_t>;
  w32.scan = scan_lanes<std::uint32_t>;
  w32.count = count_lanes<std::uint32_t>;
  w32.compress = compress32;
  w32.expand = expand32;
  w32.csr_row = csr_row32;
  WordKernels& w16 = table.words16;
  w16.mask_bytes = mask_bytes_lanes<std::uint16_t>;
  w16.mask_bits = mask_bits_lanes<std::uint16_t>;
  w16.scan = scan_lanes<std::uint16_t>;
  w16.count = count_lanes<std::uint16_t>;
  table.threshold[static_cast<int>(DType::f32)] = threshold_lanes<float, std::uint32_t>;
  table.threshold[static_cast<int>(DType::bf16)] = threshold_lanes<bf16, std::uint16_t>;
  table.threshold[static_cast<int>(DType::f16)] = threshold_lanes<f16, std::uint16_t>;
}
