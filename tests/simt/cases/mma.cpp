// ldmatrix and the matrix products. Fragments are placed by the tables of the PTX ISA, written out here a second time as
// loops over elements of the matrices, and checked on tiles made by hand.
#include "test_simt.h"

namespace sparseprune::simt::test {

namespace {

using u32 = std::uint32_t;

// Thread t's registers.
struct Operands {
  u32 a[4], b[4], e, pad[7];
};

template <typename T, int F>
SP_KERNEL mma_sp_kernel(Global<const Operands> in, Global<float> c) {
  const Operands mine = in[thread_x()];
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[4 * thread_x() + static_cast<unsigned>(i)];
  mma_sp_m16n8k32<T, F>(sum, mine.a, mine.b, mine.e);
  for (int i = 0; i < 4; ++i) c[4 * thread_x() + static_cast<unsigned>(i)] = sum[i];
}
template <typename T>
SP_KERNEL mma_kernel(Global<const Operands> in, Global<float> c) {
  const Operands mine = in[thread_x()];
  float sum[4];
  const u32 b[2] = {mine.b[0], mine.b[1]};
  for (int i = 0; i < 4; ++i) sum[i] = c[4 * thread_x() + static_cast<unsigned>(i)];
  mma_m16n8k16<T>(sum, mine.a, b);
  for (int i = 0; i < 4; ++i) c[4 * thread_x() + static_cast<unsigned>(i)] = sum[i];
}

// Places 16 bits in half `half` of a register.
void put(u32& reg, int half, std::uint16_t bits) {
  reg |= static_cast<u32>(bits) << (16 * half);
}

struct Tile {
  float a[16][32] = {}, b[32][8] = {}, c[16][8] = {};  // a: with the zeros, k columns used
};

// Small whole numbers, different everywhere: products and sums are exact.
Tile make_tile(int k, bool sparse, u32 salt) {
  Tile t;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < k; ++j) t.a[i][j] = static_cast<float>((i * 7 + j * 5 + static_cast<int>(salt)) % 13 - 6);
  }
  if (sparse) {
    // Two of every four go, another two in each chunk: all six pairs occur.
    constexpr int kGone[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
    for (int i = 0; i < 16; ++i) {
      for (int c = 0; c < k / 4; ++c) {
        for (const int gone : kGone[(i + 2 * c + static_cast<int>(salt)) % 6]) t.a[i][4 * c + gone] = 0;
      }
    }
  }
  for (int j = 0; j < k; ++j) {
    for (int n = 0; n < 8; ++n) t.b[j][n] = static_cast<float>((j * 3 + n * 11 + static_cast<int>(salt)) % 17 - 8);
  }
  for (int i = 0; i < 16; ++i) {
    for (int n = 0; n < 8; ++n) t.c[i][n] = static_cast<float>(100 * i + n);
  }
  return t;
}

template <typename T>
void check_tile(const Tile& t, int k, Operands* in, void (*kernel)(Global<const Operands>, Global<float>),
                const char* what) {
  // B[row][col]: "row = (threadID_in_group * 2) + (i & 1) (+ 8 for b2, b3; 16; 24), col = groupID".
  for (int row = 0; row < k; ++row) {
    for (int col = 0; col < 8; ++col) {
      put(in[col * 4 + row % 8 / 2].b[row / 8], row % 2, from_float<T>(t.b[row][col]).bits);
    }
  }
  clear_buffers();
  register_buffer(in, 32 * sizeof(Operands), false);
  Buffer<float> c(128);
  // C[row][col]: "row = groupID for c0, c1, groupID + 8 for c2, c3; col = threadID_in_group * 2 + (i & 1)".
  const auto place = [](int row, int col) {
    return static_cast<std::size_t>((row % 8 * 4 + col / 2) * 4 + row / 8 * 2 + col % 2);
  };
  for (int i = 0; i < 16; ++i) {
    for (int n = 0; n < 8; ++n) c[place(i, n)] = t.c[i][n];
  }
  launch(grid(32), kernel, in, c.data());
  for (int i = 0; i < 16; ++i) {
    for (int n = 0; n < 8; ++n) {
      float want = t.c[i][n];
      for (int j = 0; j < k; ++j) want += t.a[i][j] * t.b[j][n];
      expect_equal(c[place(i, n)], want, std::string(what) + ", c[" + std::to_string(i) + "][" + std::to_string(n) + "]");
    }
  }
}

template <typename T>
void test_dense(const char* what) {
  const Tile t = make_tile(16, false, 3);
  Operands in[32] = {};
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 16; ++col) {
      put(in[row % 8 * 4 + col % 8 / 2].a[row / 8 + col / 8 * 2], col % 2, from_float<T>(t.a[row][col]).bits);
    }
  }
  check_tile<T>(t, 16, in, mma_kernel<T>, what);
}

template <typename T, int F>
void sparse_operands(const Tile& t, Operands* in) {
  // The metadata of the other pair of lanes is illegal: nobody may look at it.
  for (int lane = 0; lane < 32; ++lane) in[lane].e = lane % 4 / 2 == F ? 0 : 0xffffffffu;
  for (int row = 0; row < 16; ++row) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      int kept[4], n = 0;
      for (int p = 0; p < 4; ++p) {
        if (t.a[row][4 * chunk + p] != 0) kept[n++] = p;
      }
      // A chunk with a zero more than it must have still names two places that increase.
      if (n == 0) kept[n++] = 0;
      if (n == 1) {
        kept[1] = kept[0] == 3 ? 3 : kept[0] + 1;
        if (kept[0] == 3) kept[0] = 0;
      }
      for (int v = 0; v < 2; ++v) {
        put(in[row % 8 * 4 + chunk % 4].a[row / 8 + chunk / 4 * 2], v, from_float<T>(t.a[row][4 * chunk + kept[v]]).bits);
      }
      in[row % 8 * 4 + 2 * F + chunk / 4].e |= static_cast<u32>(kept[0] | kept[1] << 2) << (row / 8 * 16 + chunk % 4 * 4);
    }
  }
}

template <typename T, int F>
void test_sparse(const char* what) {
  for (u32 salt = 0; salt < 3; ++salt) {
    const Tile t = make_tile(32, true, salt);
    Operands in[32] = {};
    sparse_operands<T, F>(t, in);
    check_tile<T>(t, 32, in, mma_sp_kernel<T, F>, what);
  }
}

// One non-zero of A, one of B: the one product lands where it must, worked out by hand.
void test_one_product() {
  // A[9][13] = 2: row 9 is group 1, the upper half; column 13 is chunk 3, place 1. So lane 4 + 3, register 1; with place 2
  // named beside it the nibble is 1 | 2 << 2 = 9. The chunk's metadata: F = 1, lane 4 + 2, bits 16 + 12.
  // B[13][5] = 3: register 1 (rows 8 to 15), lane 5 * 4 + 2, the upper half. C[9][5] = 6: lane 4 + 2, c3.
  Operands in[32] = {};
  for (auto& lane : in) lane.e = 0x44444444;
  in[7].a[1] = 0x4000;  // 2.0 in both types' high bits: bf16 0x4000, f16 0x4000
  in[6].e = 0x94444444;
  in[22].b[1] = 0x42000000;  // f16 3.0
  clear_buffers();
  register_buffer(in, sizeof in, false);
  Buffer<float> c(128);
  launch(grid(32), mma_sp_kernel<f16, 1>, in, c.data());
  for (std::size_t i = 0; i < 128; ++i) expect_equal(c[i], i == 6 * 4 + 3 ? 6.0f : 0.0f, "one product, by hand");
  const auto run = [&] { launch(grid(32), mma_sp_kernel<f16, 1>, in, c.data()); };
  in[6].e = 0x64444444;
  expect_fault(run, "metadata that falls", {"mma.sp: metadata of row 9, columns 12 to 15 names places 2, 1"});
  in[6].e = 0x44440444;
  expect_fault(run, "metadata that repeats", {"mma.sp: metadata of row 1, columns 12 to 15 names places 0, 0"});
}

template <int Matrices>
SP_KERNEL ldmatrix_kernel(Global<u32> out, unsigned offset, bool barrier) {
  const Shared<std::uint16_t> p = shared_memory<std::uint16_t>(0);
  // Element (row, col) of matrix j is 1000 j + 10 row + col; rows lie apart, in another order.
  const unsigned j = lane() / 8, row = lane() % 8;
  const Shared<std::uint16_t> mine = p + ((row * 5 + j * 3) % 8 * 4 + j) * 16;
  for (unsigned col = 0; col < 8; ++col) mine[col] = static_cast<std::uint16_t>(1000 * j + 10 * row + col);
  if (barrier) sync_warp();
  u32 r[4] = {};
  if constexpr (Matrices == 4) {
    ldmatrix_x4(r, mine + offset);
  } else {
    u32 two[2];
    ldmatrix_x2(two, lane() < 16 ? mine + offset : Shared<std::uint16_t>());  // the upper lanes' rows do not matter
    r[0] = two[0], r[1] = two[1];
  }
  for (unsigned i = 0; i < 4; ++i) out[4 * lane() + i] = r[i];
}

void test_ldmatrix() {
  clear_buffers();
  Buffer<u32> out(128);
  for (const u32 matrices : {4u, 2u}) {
    launch(grid(32, 2048), matrices == 4 ? ldmatrix_kernel<4> : ldmatrix_kernel<2>, out.data(), 0u, true);
    for (u32 lane = 0; lane < 32; ++lane) {
      for (u32 j = 0; j < 4; ++j) {
        const u32 low = 1000 * j + 10 * (lane / 4) + 2 * (lane % 4);
        expect_equal(out[4 * lane + j], j < matrices ? low | (low + 1) << 16 : 0, "ldmatrix");
      }
    }
  }
  expect_fault([&] { launch(grid(32, 2048), ldmatrix_kernel<4>, out.data(), 4u, true); }, "a misaligned row",
               {"ldmatrix row", "misaligned"});
  expect_fault([&] { launch(grid(32, 2048), ldmatrix_kernel<4>, out.data(), 1024u, true); }, "a row out of bounds",
               {"ldmatrix row", "out of bounds"});
  expect_fault([&] { launch(grid(32, 2048), ldmatrix_kernel<4>, out.data(), 0u, false); },
               "ldmatrix of what lanes have just written", {"read by the warp, which was written by thread"});
}

}  // namespace

void test_mma() {
  test_dense<bf16>("mma bf16");
  test_dense<f16>("mma f16");
  test_sparse<bf16, 0>("mma.sp bf16, selector 0");
  test_sparse<bf16, 1>("mma.sp bf16, selector 1");
  test_sparse<f16, 0>("mma.sp f16, selector 0");
  test_sparse<f16, 1>("mma.sp f16, selector 1");
  test_one_product();
  test_ldmatrix();
}

}  // namespace sparseprune::simt::test
