// Every kernel of every available instruction set under AddressSanitizer and UndefinedBehaviorSanitizer, against double.
//
// Whole numbers make float sums exact in any order, so that the only error allowed is the rounding of the result.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch/isa.h"
#include "cpu/ops/convert.h"
#include "cpu/ops/linear.h"
#include "cpu/ops/pack.h"
#include "support.h"

using namespace sparseprune;

namespace {

std::vector<char> bytes_of(DType dtype, const std::vector<float>& v) {
  std::vector<char> out(v.size() * size_of(dtype));
  for (std::size_t i = 0; i < v.size(); ++i) {
    const std::uint32_t word = encode(dtype, v[i]);
    std::memcpy(out.data() + i * size_of(dtype), &word, size_of(dtype));
  }
  return out;
}

struct Case {
  Place place;
  DType dtype;
  std::int64_t rows, cols;
  int density;  // percent
  int threads;
};

Memory words(const Case& c, const std::vector<float>& v) {
  Memory m(c.place, static_cast<std::int64_t>(v.size() * size_of(c.dtype)), static_cast<std::int64_t>(size_of(c.dtype)));
  const auto bytes = bytes_of(c.dtype, v);
  if (!bytes.empty()) std::memcpy(m.as<char>(), bytes.data(), bytes.size());
  return m;
}
std::int64_t size(const Case& c, std::int64_t n) {
  return n * static_cast<std::int64_t>(size_of(c.dtype));
}

// A weight with its bits and offsets, computed plainly.
struct Weight {
  std::vector<float> dense, kept;
  std::vector<std::uint8_t> bits, flags;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::int32_t> columns;

  explicit Weight(const Case& c) {
    const std::int64_t stride = ceil_div(c.cols, 8);
    bits.assign(static_cast<std::size_t>(c.rows * stride), 0);
    for (std::int64_t r = 0; r < c.rows; ++r) {
      for (std::int64_t k = 0; k < c.cols; ++k) {
        const bool keep = random_source.below(100) < c.density;
        dense.push_back(keep ? random_source.whole(4) : random_source.below(2) ? 0.0f : -0.0f);
        flags.push_back(keep ? static_cast<std::uint8_t>(1 + random_source.below(255)) : 0);
        if (!keep) continue;
        kept.push_back(dense.back());
        columns.push_back(static_cast<std::int32_t>(k));
        std::uint8_t& byte = bits[static_cast<std::size_t>(r * stride + k / 8)];
        byte = static_cast<std::uint8_t>(byte | 1u << k % 8);
      }
      offsets.push_back(static_cast<std::int64_t>(kept.size()));
    }
  }
  // Zeros as the inverse operations write them.
  std::vector<float> positive_zeros() const {
    std::vector<float> v = dense;
    for (float& x : v) x = x == 0 ? 0.0f : x;
    return v;
  }
};

void test_conversions(const Case& c, const Weight& w) {
  const Matrix m{c.rows, c.cols, c.dtype};
  const std::int64_t nnz = static_cast<std::int64_t>(w.kept.size()), elements = c.rows * c.cols;
  const std::int64_t bit_bytes = c.rows * ceil_div(c.cols, 8);
  const Memory dense = words(c, w.dense), values = words(c, w.kept), bits = copy_of(c.place, w.bits);
  const auto expected = bytes_of(c.dtype, w.positive_zeros());

  const Memory scanned(c.place, bit_bytes, 1), offsets(c.place, (c.rows + 1) * 8, 8);
  expect(scan_dense(m, dense.as<void>(), scanned.as<std::uint8_t>(), offsets.as<std::int64_t>(), c.threads) == nnz, "scan");
  expect(scanned.equals(w.bits.data()) && offsets.equals(w.offsets.data()), "scan: bits and offsets");
  const Memory counted(c.place, (c.rows + 1) * 8, 8);
  expect(count_dense(m, dense.as<void>(), counted.as<std::int64_t>(), c.threads) == nnz, "count");
  expect(counted.equals(w.offsets.data()), "count: offsets");
  const Memory from_bits(c.place, (c.rows + 1) * 8, 8);
  expect(count_bits(c.rows, c.cols, bits.as<std::uint8_t>(), from_bits.as<std::int64_t>(), c.threads) == nnz, "count_bits");
  expect(from_bits.equals(w.offsets.data()), "count_bits: offsets");

  const Memory kept(c.place, size(c, nnz), static_cast<std::int64_t>(size_of(c.dtype)));
  compress_dense(m, dense.as<void>(), bits.as<std::uint8_t>(), offsets.as<std::int64_t>(), kept.as<void>(), c.threads);
  expect(kept.equals(values.as<char>()), "compress");
  const Memory back(c.place, size(c, elements), static_cast<std::int64_t>(size_of(c.dtype)));
  expand_dense(m, values.as<void>(), bits.as<std::uint8_t>(), offsets.as<std::int64_t>(), back.as<void>(), c.threads);
  expect(back.equals(expected.data()), "expand");

  const Memory columns(c.place, nnz * 4, 4), csr_values(c.place, size(c, nnz), static_cast<std::int64_t>(size_of(c.dtype)));
  dense_to_csr(m, dense.as<void>(), offsets.as<std::int64_t>(), columns.as<std::int32_t>(), csr_values.as<void>(),
               c.threads);
  expect(columns.equals(w.columns.data()) && csr_values.equals(values.as<char>()), "dense_to_csr");
  const Memory from_csr(c.place, size(c, elements), static_cast<std::int64_t>(size_of(c.dtype)));
  csr_to_dense(m, offsets.as<std::int64_t>(), columns.as<std::int32_t>(), nnz, values.as<void>(), from_csr.as<void>(),
               c.threads);
  expect(from_csr.equals(expected.data()), "csr_to_dense");
}

void test_masks(const Case& c, const Weight& w) {
  const Matrix m{c.rows, c.cols, c.dtype};
  const std::int64_t elements = c.rows * c.cols, word = static_cast<std::int64_t>(size_of(c.dtype));
  std::vector<float> full;
  for (std::int64_t i = 0; i < elements; ++i) full.push_back(random_source.whole(8));
  std::vector<float> masked = full, large = full;
  std::vector<std::uint8_t> large_bits(w.bits.size(), 0);
  for (std::int64_t i = 0; i < elements; ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (!w.flags[at]) masked[at] = 0;
    if (std::abs(full[at]) <= 4) {
      large[at] = 0;
    } else {
      std::uint8_t& byte = large_bits[static_cast<std::size_t>(i / c.cols * ceil_div(c.cols, 8) + i % c.cols / 8)];
      byte = static_cast<std::uint8_t>(byte | 1u << i % c.cols % 8);
    }
  }
  const Memory x = words(c, full), flags = copy_of(c.place, w.flags), bits = copy_of(c.place, w.bits);
  const auto expected = bytes_of(c.dtype, masked);

  const Memory out(c.place, size(c, elements), word), in_place = words(c, full), out2(c.place, size(c, elements), word);
  mask_bytes(c.dtype, x.as<void>(), flags.as<std::uint8_t>(), out.as<void>(), elements, c.threads);
  expect(out.equals(expected.data()), "mask_bytes");
  mask_bytes(c.dtype, in_place.as<void>(), flags.as<std::uint8_t>(), in_place.as<void>(), elements, c.threads);
  expect(in_place.equals(expected.data()), "mask_bytes in place");
  mask_bits(m, x.as<void>(), bits.as<std::uint8_t>(), out2.as<void>(), c.threads);
  expect(out2.equals(expected.data()), "mask_bits");

  const Memory kept_bits(c.place, static_cast<std::int64_t>(w.bits.size()), 1), changed = words(c, full);
  threshold(m, changed.as<void>(), 4.0f, changed.as<void>(), kept_bits.as<std::uint8_t>(), c.threads);
  expect(changed.equals(bytes_of(c.dtype, large).data()) && kept_bits.equals(large_bits.data()), "threshold in place");

  const Memory packed_bits(c.place, static_cast<std::int64_t>(w.bits.size()), 1), unpacked(c.place, elements, 1);
  bytes_to_bits(c.rows, c.cols, flags.as<std::uint8_t>(), packed_bits.as<std::uint8_t>(), c.threads);
  expect(packed_bits.equals(w.bits.data()), "bytes_to_bits");
  bits_to_bytes(c.rows, c.cols, bits.as<std::uint8_t>(), unpacked.as<std::uint8_t>(), c.threads);
  bool same = true;
  for (std::int64_t i = 0; i < elements; ++i)
    same &= unpacked.as<std::uint8_t>()[i] == (w.flags[static_cast<std::size_t>(i)] != 0);
  expect(same, "bits_to_bytes");
}

void test_groups(const Case& c, int n, int group) {
  if (c.cols % group != 0) return;
  const std::int64_t stride = ceil_div(c.cols, 8);
  const Memory bits(c.place, c.rows * stride, 1);
  auto* b = bits.as<std::uint8_t>();
  std::memset(b, 0, static_cast<std::size_t>(c.rows * stride));
  GroupError error{-1, -1, -1};
  expect(fill_groups(c.rows, c.cols, n, group, b, &error, c.threads), "fill_groups");
  std::int64_t set = 0;
  for (std::int64_t i = 0; i < c.rows * stride; ++i) set += __builtin_popcount(b[i]);
  expect(set == c.rows * (c.cols / group) * n, "fill_groups: count");
  if (c.rows == 0 || c.cols == 0 || n == group) return;
  for (int j = 0; j < group; ++j) {
    const std::int64_t k = c.cols - group + j;
    b[(c.rows - 1) * stride + k / 8] = static_cast<std::uint8_t>(b[(c.rows - 1) * stride + k / 8] | 1u << k % 8);
  }
  expect(!fill_groups(c.rows, c.cols, n, group, b, &error, c.threads), "fill_groups: a full group is refused");
  expect(error.row == c.rows - 1 && error.group == c.cols / group - 1 && error.kept == group, "fill_groups: where");
}

struct Blob {
  Packing packing;
  std::int64_t bytes;
  Memory memory;

  Blob(const Case& c, const Weight& w, Layout layout)
      : packing{layout, c.dtype, Encoding::plain, 0},
        bytes(packed_bytes(c.rows, c.cols, packing, static_cast<std::int64_t>(w.kept.size()))),
        memory(c.place, bytes, kAlign) {
    const Memory values = words(c, w.kept), bits = copy_of(c.place, w.bits), offsets = copy_of(c.place, w.offsets);
    pack(c.rows, c.cols, packing, {values.as<void>(), bits.as<std::uint8_t>(), offsets.as<std::int64_t>()},
         memory.as<std::uint8_t>(), c.threads);
  }
};

void test_unpack(const Case& c, const Weight& w, const Blob& blob) {
  const auto* data = blob.memory.as<std::uint8_t>();
  const Memory bits(c.place, static_cast<std::int64_t>(w.bits.size()), 1), offsets = copy_of(c.place, w.offsets);
  unpack_bits(data, blob.bytes, bits.as<std::uint8_t>(), c.threads);
  expect(bits.equals(w.bits.data()), "unpack_bits");
  const Memory values(c.place, size(c, static_cast<std::int64_t>(w.kept.size())),
                      static_cast<std::int64_t>(size_of(c.dtype)));
  unpack_values(data, blob.bytes, offsets.as<std::int64_t>(), values.as<void>(), c.threads);
  expect(values.equals(bytes_of(c.dtype, w.kept).data()), "unpack_values");
}

void test_linear(const Case& c, const Weight& w, const Blob& blob, int strategy, std::int64_t batch, std::int64_t gap,
                 bool biased) {
  const std::int64_t word = static_cast<std::int64_t>(size_of(c.dtype)), stride = c.cols + gap;
  std::vector<float> x, bias;
  for (std::int64_t i = 0; i < (batch == 0 ? 0 : (batch - 1) * stride + c.cols); ++i) {
    x.push_back(i % (stride ? stride : 1) < c.cols ? random_source.whole(8) : __builtin_inff());
  }
  for (std::int64_t r = 0; r < c.rows; ++r) bias.push_back(random_source.whole(8));
  const Memory input = words(c, x), biases = words(c, bias), out(c.place, size(c, batch * c.rows), word);
  linear({blob.memory.as<std::uint8_t>(), blob.bytes, c.rows, c.cols, blob.packing, input.as<void>(), batch, stride,
          biased ? biases.as<void>() : nullptr, out.as<void>(), c.threads, strategy});
  bool same = true;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t r = 0; r < c.rows; ++r) {
      double sum = biased ? static_cast<double>(bias[static_cast<std::size_t>(r)]) : 0;
      for (std::int64_t i = w.offsets[static_cast<std::size_t>(r)]; i < w.offsets[static_cast<std::size_t>(r + 1)]; ++i) {
        const auto at = static_cast<std::size_t>(i);
        sum += static_cast<double>(w.kept[at]) * x[static_cast<std::size_t>(b * stride + w.columns[at])];
      }
      const double got = decode(c.dtype, out.as<char>() + size(c, b * c.rows + r));
      same &= std::abs(got - sum) <= unit_roundoff(c.dtype) * std::abs(sum);  // false for NaN
    }
  }
  expect(same, "linear");
}

bool serves(const PackedHeader& header, int strategy) {
  try {
    choose_plan(kernels(), header, 1, strategy);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

std::string describe(const Case& c) {
  const char* names[] = {"f32", "bf16", "f16"};
  return std::string(kernels().isa) + " " + names[static_cast<int>(c.dtype)] + " " + std::to_string(c.rows) + "x" +
         std::to_string(c.cols) + " " + std::to_string(c.density) + "%, " + std::to_string(c.threads) + " threads, " +
         (c.place == Place::heap ? "heap" : "pages");
}

// `turn` walks batches, gaps and biases, so that over all shapes every kernel meets all of them.
void test_all(const Case& c, std::int64_t& turn) {
  constexpr std::int64_t kBatches[] = {1, 0, 2, 3, 33, 4, 5, 16, 11, 13, 17, 49, 12, 25, 31, 130, 6, 65};
  constexpr std::int64_t kGaps[] = {0, 0, 1, 7};
  context = describe(c);
  const Weight w(c);
  test_conversions(c, w);
  test_masks(c, w);
  for (const auto& [n, group] : {std::pair{2, 4}, {4, 8}, {1, 4}, {3, 7}, {16, 32}, {32, 32}}) test_groups(c, n, group);
  for (const Layout layout : {Layout::tile, Layout::csr}) {
    const Blob blob(c, w, layout);
    context = describe(c) + (layout == Layout::tile ? ", tile" : ", csr");
    test_unpack(c, w, blob);
    const PackedHeader header = view_packed(blob.memory.as<std::uint8_t>(), blob.bytes).header;
    for (int strategy = 0; strategy < kStrategies; ++strategy) {
      if (!serves(header, strategy)) continue;
      for (int i = 0; i < 4; ++i, ++turn) {
        const std::int64_t batch = i == 0 ? 1 : kBatches[turn % 18];
        context = describe(c) + ", " + strategy_name(static_cast<Strategy>(strategy)) + ", batch " + std::to_string(batch);
        test_linear(c, w, blob, strategy, batch, kGaps[turn / 3 % 4], turn % 3 != 0);
      }
    }
  }
}

// says: what the error's words must hold.
template <typename Call>
void expect_refused(const Call& call, const char* what, const char* says = "") {
  bool refused = false;
  try {
    call();
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find(says) != std::string::npos;
  }
  expect(refused, what);
}

void test_header() {
  context = "header";
  for (int layout = 0; layout < kLayouts; ++layout) {
    for (int dtype = 0; dtype < kDTypes; ++dtype) {
      Packing packing{static_cast<Layout>(layout), static_cast<DType>(dtype), Encoding::plain};
      if (is_of_codes(packing.layout)) packing.encoding = Encoding::int4, packing.group = 64, packing.scales = DType::f16;
      if (packing.layout == Layout::sparse24 && packing.dtype == DType::f32) {
        expect_refused([&] { to_packing(to_code(packing)); }, "32-bit values in sparse24");
        continue;
      }
      expect(to_packing(to_code(packing)) == packing, "a packing's number names it");
      const Home home = is_cuda(packing.layout) ? Home::cuda : Home::cpu,
                 other = is_cuda(packing.layout) ? Home::cpu : Home::cuda;
      const PackedHeader h = make_header(home, 40, 100, packing, 2000, 2048);
      const std::int64_t size = geometry_of(h).total;
      require_same(read_header(home, &h, size), 40, 100, packing);
      expect_refused([&] { read_header(other, &h, size); }, "a blob for the other device",
                     "move the layer with .to(device)");
      expect_refused([&] { make_header(other, 40, 100, packing, 2000, 2048); }, "a layout of the other device");
      for (const std::int64_t wrong : {size - 1, size + 1, size + 64, size - 64}) {
        expect_refused([&] { read_header(home, &h, wrong); }, "another size", "does not fit the size");
      }
      expect_refused([&] { require_same(h, 100, 40, packing); }, "the transpose", "holds a weight of 40x100");
      if (home == Home::cpu) continue;
      const HiddenBlob seen = require_hidden(40, 100, packing, 64, size);
      expect(seen.geometry.total == size && seen.stored >= h.stored && seen.stored * 2 < h.stored * 2 + kAlign,
             "a hidden blob's sections");
      for (const std::int64_t wrong : {std::int64_t{0}, std::int64_t{64}, size - 1, size + 1, std::int64_t{1} << 40}) {
        expect_refused([&] { require_hidden(40, 100, packing, 64, wrong); }, "another size", "holds no weight of 40x100");
      }
      expect_refused([&] { require_hidden(40, 100, packing, 72, size); }, "an unaligned blob", "multiple of 16");
    }
  }
  for (const std::int64_t code : {-1, 4, 3 << 8, 1 << 16, 1 << 24}) {
    expect_refused([&] { to_packing(code); }, "a packing that is none", "packing: must be");
  }
  constexpr std::int64_t kHuge = std::int64_t{1} << 39;
  expect_refused([] { make_header(Home::cpu, kHuge, kHuge, {}, 0); }, "a shape that overflows", "shape: must be");
  expect_refused([] { require_hidden(kHuge, kHuge, {Layout::bitmap8, DType::f32, Encoding::plain, 0}, 0, 1 << 20); },
                 "a shape that overflows", "holds no weight");
}

void test_a_level_without_kernels() {
  context = "no kernels";
  KernelTable bare{};
  bare.isa = "bare";
  for (const Layout layout : {Layout::tile, Layout::csr}) {
    const PackedHeader h = make_header(Home::cpu, 40, 100, {layout, DType::bf16, Encoding::plain, 0}, 2000);
    expect_refused([&] { choose_plan(bare, h, 1); }, "values that no kernel takes", "has no kernel at level 'bare'");
    expect_refused([&] { choose_plan(bare, h, 1, 0); }, "a strategy that is not there",
                   "strategy: tile_rows does not serve");
  }
}

void test_bad_input() {
  context = "bad input";
  const Case c{Place::heap, DType::f32, 20, 36, 50, 1};
  const Weight w(c);
  for (const Layout layout : {Layout::tile, Layout::csr}) {
    const Blob blob(c, w, layout);
    for (std::int64_t bytes :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{63}, std::int64_t{64}, std::int64_t{65}, blob.bytes - 1}) {
      std::vector<std::uint8_t> part(blob.memory.as<std::uint8_t>(), blob.memory.as<std::uint8_t>() + bytes);
      const Memory cut = copy_of(Place::heap, part);
      expect_refused([&] { view_packed(cut.as<std::uint8_t>(), bytes); }, "a truncated blob");
    }
    for (int bit = 0; bit < 512; ++bit) {
      std::uint8_t& byte = blob.memory.as<std::uint8_t>()[bit / 8];
      byte = static_cast<std::uint8_t>(byte ^ 1u << bit % 8);
      expect_refused([&] { view_packed(blob.memory.as<std::uint8_t>(), blob.bytes); }, "a flipped bit of the header");
      byte = static_cast<std::uint8_t>(byte ^ 1u << bit % 8);
    }
  }
  float dense[8], values[3] = {1, 2, 3};
  const auto csr = [&](std::vector<std::int64_t> crow, std::vector<std::int32_t> col) {
    const Memory rows = copy_of(Place::heap, crow), columns = copy_of(Place::heap, col);
    csr_to_dense({2, 4, DType::f32}, rows.as<std::int64_t>(), columns.as<std::int32_t>(),
                 static_cast<std::int64_t>(col.size()), values, dense, 1);
  };
  expect_refused([&] { csr({0, 1, 2}, {0, 1, 2}); }, "crow that ends early");
  expect_refused([&] { csr({0, 5, 3}, {0, 1, 2}); }, "crow past the values");
  expect_refused([&] { csr({0, -5, 3}, {0, 1, 2}); }, "crow below zero");
  expect_refused([&] { csr({0, 2, 3}, {0, 4, 2}); }, "a column past the end");
  expect_refused([&] { csr({0, 2, 3}, {-1, 3, 2}); }, "a column before the start");
  expect_refused([&] { csr({0, 2, 3}, {2, 2, 2}); }, "a column twice");
  const std::uint8_t padded[] = {0x1f, 0x0f, 0xff};
  std::int64_t offsets[4];
  expect(count_bits(3, 4, padded, offsets, 1) == -1, "padding bits: the first row that has one");
  expect(count_bits(3, 5, padded, offsets, 1) == -3, "padding bits: the first row that has one");
}

}  // namespace

int main() {
  const std::vector<std::int64_t> rows = {0, 1, 15, 16, 17, 33, 65};
  const std::vector<std::int64_t> cols = {0, 1, 7, 8, 16, 31, 32, 33, 64, 97, 128, 257};
  constexpr int kDensities[] = {50, 10, 100, 0, 50};
  std::int64_t turn = 0;
  test_header();
  test_a_level_without_kernels();
  test_bad_input();
  for (const std::string& isa : isas_available()) {
    set_isa(isa);
    const std::int64_t before = passed;
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const Place place : {Place::heap, Place::pages}) {
        std::int64_t i = 0;
        for (const std::int64_t r : rows) {
          for (const std::int64_t k : cols) {
            test_all({place, dtype, r, k, kDensities[i % 5], 1 + static_cast<int>(i % 2)}, turn);
            ++i;
          }
        }
        test_all({place, dtype, 33, 1100, 50, 2}, turn);  // past one chunk of AMX
        test_all({place, dtype, 17, 2100, 10, 1}, turn);  // and two
        test_all({place, dtype, 3, 65537, 1, 2}, turn);   // columns of four bytes
        test_all({place, dtype, 300, 64, 50, 2}, turn);   // several shares a thread
      }
    }
    std::printf("%s: %lld checks\n", isa.c_str(), static_cast<long long>(passed - before));
  }
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed), static_cast<long long>(failed));
  return failed != 0;
}
