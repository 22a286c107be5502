// AVX-512 with VBMI2 and VNNI: words are compressed and expanded by one instruction, 32 at a time; codes are multiplied by
// vpdpbusd, and vpermb picks the activations of 64 columns.
#include "cpu/kernels.h"
#include "cpu/x86/avx512_vbmi2/quant.h"

namespace sparseprune::avx512_vbmi2 {
namespace {

#include "cpu/kernels/bytes_panel.inl"

#include "cpu/kernels/quant_rows.inl"

#include "cpu/kernels/quads.inl"

#include "cpu/kernels/octets.inl"

#include "cpu/kernels/bitquads.inl"

inline __mmask32 first32(std::int64_t n) {
  return n >= 32 ? ~0u : (1u << n) - 1u;
}
inline std::uint32_t load_bits(const std::uint8_t* bits, std::int64_t n) {
  std::uint32_t m = 0;
  std::memcpy(&m, bits, static_cast<std::size_t>(n >= 32 ? 4 : ceil_div(n, 8)));
  return m;
}
void compress16(const void* in, const std::uint8_t* bits, void* out, std::int64_t n) {
  const auto* x = static_cast<const std::uint16_t*>(in);
  auto* y = static_cast<std::uint16_t*>(out);
  for (std::int64_t i = 0; i < n; i += 32) {
    const std::uint32_t m = load_bits(bits + i / 8, n - i);
    const int kept = popcount(m);
    const __m512i packed = _mm512_maskz_compress_epi16(m, _mm512_maskz_loadu_epi16(first32(n - i), x + i));
    _mm512_mask_storeu_epi16(y, first32(kept), packed);  // exactly the kept words: the next row is another thread's
    y += kept;
  }
}
void expand16(const void* values, const std::uint8_t* bits, void* out, std::int64_t n) {
  const auto* x = static_cast<const std::uint16_t*>(values);
  auto* y = static_cast<std::uint16_t*>(out);
  for (std::int64_t i = 0; i < n; i += 32) {
    const std::uint32_t m = load_bits(bits + i / 8, n - i);
    const int kept = popcount(m);
    const __m512i packed = _mm512_maskz_loadu_epi16(first32(kept), x);
    _mm512_mask_storeu_epi16(y + i, first32(n - i), _mm512_maskz_expand_epi16(m, packed));
    x += kept;
  }
}
void csr_row16(const void* in, std::int32_t* cols, void* values, std::int64_t n) {
  const auto* x = static_cast<const std::uint16_t*>(in);
  auto* y = static_cast<std::uint16_t*>(values);
  __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (std::int64_t i = 0; i < n; i += 32) {
    const __m512i words = _mm512_maskz_loadu_epi16(first32(n - i), x + i);
    const __mmask32 m = _mm512_test_epi16_mask(words, _mm512_set1_epi16(0x7fff));
    const int kept = popcount(m), low = popcount(m & 0xffffu);
    _mm512_mask_storeu_epi16(y, first32(kept), _mm512_maskz_compress_epi16(m, words));
    _mm512_mask_storeu_epi32(cols, first(low), _mm512_maskz_compress_epi32(m & 0xffffu, column));
    column = _mm512_add_epi32(column, _mm512_set1_epi32(16));
    _mm512_mask_storeu_epi32(cols + low, first(kept - low), _mm512_maskz_compress_epi32(m >> 16, column));
    column = _mm512_add_epi32(column, _mm512_set1_epi32(16));
    y += kept;
    cols += kept;
  }
}

}  // namespace

void install(KernelTable& table) {
  table.isa = "avx512_vbmi2";
  table.words16.compress = compress16;
  table.words16.expand = expand16;
  table.words16.csr_row = csr_row16;
  install_quant(table);
}

}  // namespace sparseprune::avx512_vbmi2
