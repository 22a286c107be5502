// Masks, bitmaps and CSR rows over raw words (W = uint16_t or uint32_t): sign-less zero tests, no conversions.
// Plain loops that the compiler vectorizes with this level's flags; levels override what it does not.

template <typename W>
constexpr W magnitude_bits() {
  return static_cast<W>(static_cast<W>(~W{0}) >> 1);
}

template <typename W>
void mask_bytes(const void* in, const std::uint8_t* mask, void* out, std::int64_t n) {
  const W* x = static_cast<const W*>(in);
  W* y = static_cast<W*>(out);
  for (std::int64_t i = 0; i < n; ++i) y[i] = static_cast<W>(mask[i] ? x[i] : 0);
}

template <typename W>
void mask_bits(const void* in, const std::uint8_t* bits, void* out, std::int64_t n) {
  const W* x = static_cast<const W*>(in);
  W* y = static_cast<W*>(out);
  for (std::int64_t i = 0; i < n; ++i) y[i] = static_cast<W>(bits[i / 8] >> (i % 8) & 1 ? x[i] : 0);
}

template <typename W>
std::int64_t scan(const void* in, std::uint8_t* bits, std::int64_t n) {
  const W* x = static_cast<const W*>(in);
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < n; i += 8) {
    unsigned byte = 0;
    for (std::int64_t j = 0; j < 8 && i + j < n; ++j) byte |= ((x[i + j] & magnitude_bits<W>()) != 0) << j;
    bits[i / 8] = static_cast<std::uint8_t>(byte);
    kept += popcount(byte);
  }
  return kept;
}

template <typename W>
std::int64_t count(const void* in, std::int64_t n) {
  const W* x = static_cast<const W*>(in);
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < n; ++i) kept += (x[i] & magnitude_bits<W>()) != 0;
  return kept;
}

template <typename W>
void compress(const void* in, const std::uint8_t* bits, void* out, std::int64_t n) {
  const W* x = static_cast<const W*>(in);
  W* y = static_cast<W*>(out);
  for (std::int64_t i = 0; i < n; i += 8) {
    for (unsigned byte = bits[i / 8]; byte != 0; byte &= byte - 1) *y++ = x[i + __builtin_ctz(byte)];
  }
}

template <typename W>
void expand_words(const void* values, const std::uint8_t* bits, void* out, std::int64_t n) {
  const W* x = static_cast<const W*>(values);
  W* y = static_cast<W*>(out);
  for (std::int64_t i = 0; i < n; ++i) y[i] = bits[i / 8] >> (i % 8) & 1 ? *x++ : W{0};
}

template <typename W>
void csr_row(const void* in, std::int32_t* cols, void* values, std::int64_t n) {
  const W* x = static_cast<const W*>(in);
  W* y = static_cast<W*>(values);
  for (std::int64_t i = 0; i < n; ++i) {
    if ((x[i] & magnitude_bits<W>()) == 0) continue;
    *cols++ = static_cast<std::int32_t>(i);
    *y++ = x[i];
  }
}

template <typename T>
void threshold(const void* in, float limit, void* out, std::uint8_t* bits, std::int64_t n) {
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(out);
  for (std::int64_t i = 0; i < n; i += 8) {
    unsigned byte = 0;
    for (std::int64_t j = 0; j < 8 && i + j < n; ++j) {
      const bool kept = !(__builtin_fabsf(to_float(x[i + j])) <= limit);
      byte |= static_cast<unsigned>(kept) << j;
      y[i + j] = kept ? x[i + j] : T{};
    }
    bits[i / 8] = static_cast<std::uint8_t>(byte);
  }
}

template <typename W>
constexpr WordKernels word_kernels() {
  return {mask_bytes<W>, mask_bits<W>, scan<W>, compress<W>, expand_words<W>, csr_row<W>, count<W>};
}
