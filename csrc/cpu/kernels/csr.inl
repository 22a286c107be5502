// Linear over `csr` weights: columns [nnz] (2 or 4 bytes), values [nnz], offsets [rows + 1].
//
// csr_gather  out[b, r] = dot(values of row r, x[b] at their columns). Panel: rows_f32. For one batch row.
// csr_batch   lanes are batch rows: acc[lanes] += value * x[lanes][column]. Panel: blocks_f32. A row runs over all of K
//             at once, so the plan chooses the block such that a panel stays in the L2 cache.

template <typename T, typename C>
inline void csr_gather_columns(const LinearJob& job, std::int64_t begin, std::int64_t end) {
  const auto* columns = static_cast<const C*>(job.index);
  const auto* values = static_cast<const T*>(job.values);
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t first_value = job.offsets[r], n = job.offsets[r + 1] - first_value;
    const float bias = job.bias ? to_float(static_cast<const T*>(job.bias)[r]) : 0.0f;
    for (std::int64_t b = 0; b < job.batch; ++b) {
      const float* x = static_cast<const float*>(job.panel) + b * job.kpad;
      const float sum = gather_dot(values + first_value, columns + first_value, n, x);
      from_float(sum + bias, static_cast<T*>(job.out) + b * job.rows + r);
    }
  }
}

template <typename T>
void csr_gather(const LinearJob& job, std::int64_t begin, std::int64_t end, void*) {
  if (job.column_bytes == 2) {
    csr_gather_columns<T, std::uint16_t>(job, begin, end);
  } else {
    csr_gather_columns<T, std::int32_t>(job, begin, end);
  }
}

// kUnroll sums run side by side to cover the latency of FMA where NV lanes alone do not.
template <typename T, typename C, int NV>
inline void csr_batch_row(const LinearJob& job, std::int64_t r, std::int64_t b0, const float* panel) {
  constexpr int kUnroll = NV == 1 ? 4 : NV <= 3 ? 2 : 1;
  constexpr std::int64_t width = 16 * NV;
  const auto* columns = static_cast<const C*>(job.index);
  const auto* values = static_cast<const T*>(job.values);
  Vec acc[kUnroll][NV];
  for (auto& part : acc) {
    for (auto& a : part) a = zero();
  }
  std::int64_t i = job.offsets[r];
  const std::int64_t end = job.offsets[r + 1];
  for (; i + kUnroll <= end; i += kUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const float* x = panel + static_cast<std::int64_t>(columns[i + u]) * width;
      const auto scale = broadcast(to_float(values[i + u]));
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[u][v] = fma(load(x + 16 * v), scale, acc[u][v]);
    }
  }
  for (; i < end; ++i) {
    const float* x = panel + static_cast<std::int64_t>(columns[i]) * width;
    const auto scale = broadcast(to_float(values[i]));
    for (int v = 0; v < NV; ++v) acc[0][v] = fma(load(x + 16 * v), scale, acc[0][v]);
  }
  const float bias = job.bias ? to_float(static_cast<const T*>(job.bias)[r]) : 0.0f;
  for (int v = 0; v < NV; ++v) {
    Vec sum = acc[0][v];
    for (int u = 1; u < kUnroll; ++u) sum = add(sum, acc[u][v]);
    float lanes[16];
    store(lanes, sum);
    const std::int64_t b1 = b0 + 16 * v;
    for (std::int64_t b = b1; b < job.batch && b < b1 + 16; ++b) {
      from_float(lanes[b - b1] + bias, static_cast<T*>(job.out) + b * job.rows + r);
    }
  }
}

template <typename T, typename C, int NV>
inline void csr_batch_sized(const LinearJob& job, std::int64_t begin, std::int64_t end, std::int64_t b0, const float* panel,
                            std::int64_t lanes) {
  if (lanes == NV) {
    for (std::int64_t r = begin; r < end; ++r) csr_batch_row<T, C, NV>(job, r, b0, panel);
  } else if constexpr (NV > 1) {
    csr_batch_sized<T, C, NV - 1>(job, begin, end, b0, panel, lanes);
  }
}

template <typename T>
void csr_batch(const LinearJob& job, std::int64_t begin, std::int64_t end, void*) {
  for (std::int64_t b = 0; b < job.batch; b += job.block) {
    const std::int64_t rows = job.batch - b < job.block ? job.batch - b : job.block;
    const float* panel = static_cast<const float*>(job.panel) + b * job.kpad;
    const std::int64_t lanes = ceil_div(rows, 16);
    if (job.column_bytes == 2) {
      csr_batch_sized<T, std::uint16_t, kMaxLanes>(job, begin, end, b, panel, lanes);
    } else {
      csr_batch_sized<T, std::int32_t, kMaxLanes>(job, begin, end, b, panel, lanes);
    }
  }
}
