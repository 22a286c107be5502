// Packs activations for the kernels of int8 and int4 weights: bytes, quantized in groups of columns.
//
//   q[b][k] = round(x[b][k] / scale[b][g])    scale[b][g] = max |x[b][k]| / 127  over the columns k of group g
//
// Panel: bytes [kpad/64][width][64] of each block (q, or q + 128 for kernels that take activations without a sign),
// blocks after each other; then per block [kpad/group][width] each: float scale; int32 start, -zero * sum(q), where the
// sum of a product begins whose weights are `zero` too large; float sum, scale * sum(q), which meets a minimum.
// A group with a NaN or an infinity has the scale NaN, so that all outputs of its row become NaN. A group whose largest
// magnitude is below 2^-119 counts as zeros: 127 / largest would overflow.

struct BytesBlock {
  std::uint8_t* bytes;
  float* scales;
  std::int32_t* starts;
  float* sums;
};
inline BytesBlock bytes_block(void* panel, std::int64_t batch, std::int64_t kpad, std::int64_t groups, std::int64_t b0,
                              std::int64_t width) {
  auto* bytes = static_cast<std::uint8_t*>(panel);
  auto* scales = reinterpret_cast<float*>(bytes + batch * kpad) + 3 * b0 * groups;
  return {bytes + b0 * kpad, scales, reinterpret_cast<std::int32_t*>(scales + width * groups), scales + 2 * width * groups};
}

// V vectors of 16 columns: a group. n columns of it are in x.
template <int V, typename T>
inline void pack_group(const PanelJob& job, const T* x, std::int64_t n, std::uint8_t* bytes, const BytesBlock& out,
                       std::int64_t at) {
  Vec v[V];
  if (n >= 16 * V) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) v[i] = load_n(x + 16 * i, 16);
  } else {
    for (int i = 0; i < V; ++i) {
      const std::int64_t left = n - 16 * i;
      v[i] = left > 0 ? load_n(x + 16 * i, static_cast<int>(left < 16 ? left : 16)) : zero();
    }
  }
  const float largest = largest_magnitude<V>(v);
  const bool finite = largest <= 0x1.fffffep127f, some = finite && largest >= 0x1p-119f;
  const float scale = some ? largest * (1.0f / 127.0f) : finite ? 0.0f : __builtin_nanf("");
  const std::int32_t sum = quantize<V>(v, some ? 127.0f / largest : 0.0f, job.flip, bytes);
  out.scales[at] = scale;
  out.starts[at] = -job.zero * sum;
  out.sums[at] = scale * static_cast<float>(sum);
}

// Units of 64 columns.
template <typename T>
void pack_bytes(const PanelJob& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t groups = job.kpad / job.group;
  for (std::int64_t b0 = 0; b0 < job.batch; b0 += job.block) {
    const std::int64_t width = job.batch - b0 < job.block ? job.batch - b0 : job.block;
    const BytesBlock out = bytes_block(job.panel, job.batch, job.kpad, groups, b0, width);
    for (std::int64_t b = 0; b < width; ++b) {
      const T* x = static_cast<const T*>(job.x) + (b0 + b) * job.stride;
      for (std::int64_t k = begin * 64; k < end * 64; k += 64) {
        std::uint8_t* bytes = out.bytes + (k * width + b * 64);
        if (job.group == 64) {
          pack_group<4>(job, x + k, job.cols - k, bytes, out, k / 64 * width + b);
        } else {
          pack_group<2>(job, x + k, job.cols - k, bytes, out, k / 32 * width + b);
          pack_group<2>(job, x + k + 32, job.cols - k - 32, bytes + 32, out, (k / 32 + 1) * width + b);
        }
      }
    }
  }
}
