// Training through codes: t = (w - minimum) / scale + zero, code = round(clamp(t)), value = (code - zero) * scale + minimum.
// The columns of one group of one row. Plain loops that the compiler vectorizes with this level's flags.

constexpr float kRoundToEven = 12582912.0f;  // 1.5 * 2^23: whole numbers are all that floats can tell apart about it

struct RoundedLane {
  float steps, code;
};

inline RoundedLane round_lane(float w, const GroupGrid& g) {
  const float steps = (w - g.minimum) * g.inverse + g.zero;
  float code = steps < g.least ? g.least : steps;  // NaN stays NaN
  code = code > g.largest ? g.largest : code;
  return {steps, (code + kRoundToEven) - kRoundToEven};
}

// f(i, lane of 16) for each column, the last ones with lane 0.
template <typename F>
inline void for_lanes(std::int64_t n, const F& f) {
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int lane = 0; lane < 16; ++lane) f(i + lane, lane);
  }
  for (; i < n; ++i) f(i, 0);
}

template <typename T>
void round_values(const float* w, const std::uint8_t* kept, std::int64_t n, const GroupGrid& g, void* out) {
  T* y = static_cast<T*>(out);
  float values[16];
  for (std::int64_t i = 0; i < n; i += 16) {
    const int m = n - i < 16 ? static_cast<int>(n - i) : 16;
    for_lanes(m, [&](std::int64_t j, int) { values[j] = (round_lane(w[i + j], g).code - g.zero) * g.scale + g.minimum; });
    if (kept != nullptr) {
      for_lanes(m, [&](std::int64_t j, int) { values[j] = kept[i + j] ? values[j] : 0.0f; });
    }
    store_n(y + i, load_n(values, m), m);
  }
}

inline void round_codes(const float* w, const std::uint8_t* kept, std::int64_t n, const GroupGrid& g, std::int8_t* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float code = round_lane(w[i], g).code;
    const bool counts = (kept == nullptr || kept[i]) && code == code;
    out[i] = static_cast<std::int8_t>(counts ? code : g.zero);
  }
}

// Straight through: within the codes dv/dw = 1 and dv/dscale = code - t; where t is clamped, or the scale is 0, dv/dscale =
// code - zero and dv/dminimum = 1. A pruned weight has no gradient and gives none.
template <typename T>
void round_gradients(const float* w, const std::uint8_t* kept, const void* gradient, std::int64_t n, const GroupGrid& g,
                     float* of_weight, float* of_scale, float* of_minimum) {
  const T* up = static_cast<const T*>(gradient);
  float scale[16] = {}, minimum[16] = {}, x[16];
  const bool trained = g.scale != 0.0f;
  for (std::int64_t i = 0; i < n; i += 16) {
    const int m = n - i < 16 ? static_cast<int>(n - i) : 16;
    store(x, load_n(up + i, m));
    if (kept != nullptr) {
      for_lanes(m, [&](std::int64_t j, int) { x[j] = kept[i + j] ? x[j] : 0.0f; });
    }
    for_lanes(m, [&](std::int64_t j, int lane) {
      const RoundedLane r = round_lane(w[i + j], g);
      const float off = r.code - r.steps;
      const bool inside = trained & (off <= 0.5f) & (off >= -0.5f);
      of_weight[i + j] = inside ? x[j] : 0.0f;
      scale[lane] += x[j] * (inside ? off : r.code - g.zero);
      minimum[lane] += inside ? 0.0f : x[j];
    });
  }
  for (int lane = 1; lane < 16; ++lane) {
    scale[0] += scale[lane];
    minimum[0] += minimum[lane];
  }
  *of_scale = scale[0];
  *of_minimum = minimum[0];
}
