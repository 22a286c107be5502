// int8 and int4 weights on every available instruction set under AddressSanitizer and UndefinedBehaviorSanitizer, against
// double. Activations are whole numbers and each group of 32 holds a 127, so that rounding them to int8 changes nothing.
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch/isa.h"
#include "cpu/ops/linear.h"
#include "cpu/ops/lookup.h"
#include "cpu/ops/pack.h"
#include "support.h"

using namespace sparseprune;

namespace {

struct Case {
  Place place;
  Packing packing;
  std::int64_t rows, cols;
  int threads;
};

std::uint16_t half(double x, DType dtype) {
  return static_cast<std::uint16_t>(encode(dtype, static_cast<float>(x)));
}

// A weight's canonical form, and what its codes stand for: dense[row * cols + col].
struct Weight {
  std::vector<std::uint8_t> codes, mask;
  std::vector<std::int64_t> offsets;  // of each row's first code, for bitquads
  std::vector<std::uint16_t> scales, minimums;
  std::vector<double> dense;

  explicit Weight(const Case& c) {
    const Packing& p = c.packing;
    const bool two_four = p.layout == Layout::octets, any = p.layout == Layout::bitquads, sparse = two_four || any;
    const bool byte = p.encoding == Encoding::int8;
    const std::int64_t groups = ceil_div(c.cols, p.group), stride = ceil_div(c.cols, 8);
    std::vector<double> scale, minimum;
    for (std::int64_t i = 0; i < c.rows * groups; ++i) {
      scale.push_back(std::ldexp(random_source.whole(7), -7));  // float16 holds every sum
      minimum.push_back(std::ldexp(random_source.whole(7), -2));
      scales.push_back(half(scale.back(), p.scales));
      if (has_minimums(p.encoding)) minimums.push_back(half(minimum.back(), p.scales));
    }
    if (sparse) mask.assign(static_cast<std::size_t>(c.rows * stride), 0);
    std::int64_t count = 0;
    if (any) offsets.push_back(0);
    for (std::int64_t r = 0; r < c.rows; ++r) {
      const std::int64_t tenths = random_source.below(11);  // kept of a bitmap's row: from none to all
      std::int64_t first = 0, second = 0;
      for (std::int64_t k = 0; k < c.cols; ++k) {
        if (k % 4 == 0) first = random_source.below(4), second = (first + 1 + random_source.below(3)) % 4;
        if ((two_four && k % 4 != first && k % 4 != second) || (any && random_source.below(10) >= tenths)) {
          dense.push_back(0);
          continue;
        }
        if (sparse) {
          std::uint8_t& bits = mask[static_cast<std::size_t>(r * stride + k / 8)];
          bits = static_cast<std::uint8_t>(bits | 1u << k % 8);
        }
        const auto at = static_cast<std::size_t>(r * groups + k / p.group);
        const auto code = static_cast<int>(random_source.below(byte ? 256 : 16));
        const int number = byte ? code - 128 : has_minimums(p.encoding) ? code : code - 8;
        dense.push_back(number * scale[at] + (has_minimums(p.encoding) ? minimum[at] : 0));
        const bool low = count++ % 2 == 0;
        if (byte) {
          codes.push_back(static_cast<std::uint8_t>(number));
        } else if (low) {
          codes.push_back(static_cast<std::uint8_t>(code));
        } else {
          codes.back() = static_cast<std::uint8_t>(codes.back() | code << 4);
        }
      }
      if (any) offsets.push_back(count);
    }
  }
};

void test_linear(const Case& c, const Weight& w, const Memory& blob, std::int64_t bytes, std::int64_t batch, bool biased) {
  const DType dtype = c.packing.dtype;
  const auto word = static_cast<std::int64_t>(size_of(dtype));
  std::vector<float> x, bias;
  for (std::int64_t i = 0; i < batch * c.cols; ++i) {
    x.push_back(i % c.cols % 32 == 0 ? 127.0f : static_cast<float>(random_source.below(255) - 127));
  }
  for (std::int64_t r = 0; r < c.rows; ++r) bias.push_back(random_source.whole(8));
  const auto words = [&](const std::vector<float>& v) {
    Memory m(c.place, static_cast<std::int64_t>(v.size()) * word, word);
    for (std::size_t i = 0; i < v.size(); ++i) {
      const std::uint32_t bits = encode(dtype, v[i]);
      std::memcpy(m.as<char>() + static_cast<std::int64_t>(i) * word, &bits, size_of(dtype));
    }
    return m;
  };
  const Memory input = words(x), biases = words(bias), out(c.place, batch * c.rows * word, word);
  linear({blob.as<std::uint8_t>(), bytes, c.rows, c.cols, c.packing, input.as<void>(), batch, c.cols,
          biased ? biases.as<void>() : nullptr, out.as<void>(), c.threads});
  bool close = true;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t r = 0; r < c.rows; ++r) {
      double sum = biased ? static_cast<double>(bias[static_cast<std::size_t>(r)]) : 0, size = std::abs(sum);
      for (std::int64_t k = 0; k < c.cols; ++k) {
        const double product =
            w.dense[static_cast<std::size_t>(r * c.cols + k)] * x[static_cast<std::size_t>(b * c.cols + k)];
        sum += product;
        size += std::abs(product) + (w.minimums.empty() ? 0 : 2 * 127 * 2);  // codes and minimums cancel
      }
      const double got = decode(dtype, out.as<char>() + (b * c.rows + r) * word);
      close &= std::abs(got - sum) <= 3e-6 * size + unit_roundoff(dtype) * std::abs(sum);
    }
  }
  expect(close, "linear");
}

// Every row, the last one first; an index that is not a row is refused.
void test_lookup(const Case& c, const Weight& w, const Memory& blob, std::int64_t bytes) {
  const DType dtype = c.packing.dtype;
  const auto word = static_cast<std::int64_t>(size_of(dtype));
  const Memory indices(c.place, c.rows * 8, 8), out(c.place, c.rows * c.cols * word, word);
  for (std::int64_t i = 0; i < c.rows; ++i) indices.as<std::int64_t>()[i] = c.rows - 1 - i;
  const auto call = [&] {
    lookup({blob.as<std::uint8_t>(), bytes, c.rows, c.cols, c.packing, indices.as<void>(), 8, c.rows, out.as<void>(),
            c.threads});
  };
  call();
  bool close = true;
  for (std::int64_t i = 0; i < c.rows * c.cols; ++i) {
    const double number = w.dense[static_cast<std::size_t>((c.rows - 1 - i / c.cols) * c.cols + i % c.cols)];
    const double got = decode(dtype, out.as<char>() + i * word);
    close &= std::abs(got - number) <= unit_roundoff(dtype) * std::abs(number);
  }
  expect(close, "lookup");
  if (c.rows == 0) return;
  for (const std::int64_t wrong : {std::int64_t{-1}, c.rows, std::int64_t{1} << 40}) {
    indices.as<std::int64_t>()[c.rows - 1] = wrong;
    bool refused = false;
    try {
      call();
    } catch (const std::out_of_range&) {
      refused = true;
    }
    expect(refused, "an index that is not a row is refused");
  }
}

// batch: one more to multiply with.
void test_all(const Case& c, std::int64_t& turn, std::int64_t batch = 1) {
  context = std::string(kernels().isa) + " " + describe(c.packing) + " " + std::to_string(c.rows) + "x" +
            std::to_string(c.cols) + ", group " + std::to_string(c.packing.group);
  const Weight w(c);
  const Memory codes = copy_of(c.place, w.codes), mask = copy_of(c.place, w.mask), scales = copy_of(c.place, w.scales),
               minimums = copy_of(c.place, w.minimums), offsets = copy_of(c.place, w.offsets);
  const auto* rows_at = w.offsets.empty() ? nullptr : offsets.as<std::int64_t>();
  const std::int64_t bytes =
      packed_bytes(c.rows, c.cols, c.packing, w.offsets.empty() ? 0 : w.offsets.back(), mask.as<std::uint8_t>());
  const Memory blob(c.place, bytes, kAlign);
  auto* data = blob.as<std::uint8_t>();
  pack(c.rows, c.cols, c.packing,
       {codes.as<void>(), mask.as<std::uint8_t>(), rows_at, scales.as<std::uint16_t>(), minimums.as<std::uint16_t>()}, data,
       c.threads);

  const Memory codes2(c.place, static_cast<std::int64_t>(w.codes.size()), 1),
      mask2(c.place, static_cast<std::int64_t>(w.mask.size()), 1),
      scales2(c.place, static_cast<std::int64_t>(2 * w.scales.size()), 2),
      minimums2(c.place, static_cast<std::int64_t>(2 * w.minimums.size()), 2);
  unpack_values(data, bytes, rows_at, codes2.as<void>(), c.threads);
  unpack_scales(data, bytes, scales2.as<std::uint16_t>(), minimums2.as<std::uint16_t>(), c.threads);
  if (!w.mask.empty()) unpack_bits(data, bytes, mask2.as<std::uint8_t>(), c.threads);
  expect(codes2.equals(w.codes.data()) && scales2.equals(w.scales.data()) && minimums2.equals(w.minimums.data()) &&
             mask2.equals(w.mask.data()),
         "unpacked as it was packed");
  if (c.packing.layout == Layout::quads) test_lookup(c, w, blob, bytes);

  test_linear(c, w, blob, bytes, batch, false);
  constexpr std::int64_t kBatches[] = {1, 0, 2, 3, 8, 4, 5, 9, 17, 7};
  for (int i = 0; i < 2; ++i, ++turn) test_linear(c, w, blob, bytes, kBatches[turn % 10], turn % 3 != 0);
}

}  // namespace

int main() {
  constexpr Encoding kDense[] = {Encoding::int8, Encoding::int4, Encoding::int4_minimum};
  std::int64_t turn = 0;
  for (const std::string& isa : isas_available()) {
    set_isa(isa);
    const std::int64_t before = passed;
    for (const Place place : {Place::heap, Place::pages}) {
      for (const std::int64_t rows : {0, 1, 15, 16, 17, 33, 65}) {
        for (const std::int64_t cols : {0, 4, 28, 32, 60, 64, 68, 128, 132, 260}) {
          for (const std::uint16_t group : {32, 64, 128}) {
            const DType dtype = static_cast<DType>(random_source.below(3)),
                        scale = random_source.below(2) ? DType::f16 : DType::bf16;
            const int threads = 1 + static_cast<int>(random_source.below(2));
            for (const Encoding e : kDense)
              test_all({place, {Layout::quads, dtype, e, group, scale}, rows, cols, threads}, turn);
            for (const Encoding e : {Encoding::int8, Encoding::int4}) {
              test_all({place, {Layout::octets, dtype, e, group, scale}, rows, cols, threads}, turn);
              test_all({place, {Layout::bitquads, dtype, e, group, scale}, rows, cols + random_source.below(4), threads},
                       turn);
            }
          }
        }
      }
      test_all({place, {Layout::quads, DType::bf16, Encoding::int4, 64, DType::f16}, 17, 63, 2}, turn);  // an odd width
      test_all({place, {Layout::octets, DType::f32, Encoding::int8, 32, DType::f16}, 300, 1028, 2}, turn);
      test_all({place, {Layout::bitquads, DType::f32, Encoding::int4, 32, DType::f16}, 300, 1025, 2}, turn);
      test_all({place, {Layout::bitquads, DType::bf16, Encoding::int8, 64, DType::f16}, 33, 300, 2}, turn, 1030);
    }
    std::printf("%s: %lld checks\n", isa.c_str(), static_cast<long long>(passed - before));
  }
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed), static_cast<long long>(failed));
  return failed != 0;
}
