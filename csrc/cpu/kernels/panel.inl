// Packs activations for the kernels as float: rows, or blocks of batch rows with k outermost. Past x lie zeros.

template <typename T>
void pack_rows_f32(const PanelJob& job, std::int64_t begin, std::int64_t end) {
  for (std::int64_t b = begin; b < end; ++b) {
    const T* x = static_cast<const T*>(job.x) + b * job.stride;
    float* out = static_cast<float*>(job.panel) + b * job.kpad;
    for (std::int64_t k = 0; k < job.kpad; k += 16) {
      const std::int64_t left = job.cols - k;
      store(out + k, left > 0 ? load_n(x + k, static_cast<int>(left < 16 ? left : 16)) : zero());
    }
  }
}

template <typename T>
void pack_blocks_f32(const PanelJob& job, std::int64_t begin, std::int64_t end) {
  for (std::int64_t b0 = 0; b0 < job.batch; b0 += job.block) {
    const std::int64_t rows = job.batch - b0 < job.block ? job.batch - b0 : job.block;
    const std::int64_t width = round_up(rows, job.round);
    float* block = static_cast<float*>(job.panel) + b0 * job.kpad;
    for (std::int64_t k = begin * 16; k < end * 16; k += 16) {
      const int n = static_cast<int>(job.cols - k < 0 ? 0 : job.cols - k < 16 ? job.cols - k : 16);
      for (std::int64_t b = 0; b < width; b += 16) {
        float tile[16][16];
        const int lanes = static_cast<int>(width - b < 16 ? width - b : 16);
        for (int i = 0; i < lanes; ++i) {
          const T* x = static_cast<const T*>(job.x) + (b0 + b + i) * job.stride + k;
          store(tile[i], n > 0 && b + i < rows ? load_n(x, n) : zero());
        }
        float* out = block + k * width + b;
        if (lanes == 16) {
          for (int i = 0; i < 16; ++i) {
            for (int lane = 0; lane < 16; ++lane) out[i * width + lane] = tile[lane][i];
          }
        } else {
          for (int i = 0; i < 16; ++i) {
            for (int lane = 0; lane < lanes; ++lane) out[i * width + lane] = tile[lane][i];
          }
        }
      }
    }
  }
}
