// Fills the table with the algorithms above, for every value type. Last include of a level's table.cpp.

inline std::size_t no_scratch(const LinearJob&) {
  return 0;
}

template <typename T>
void install_type(KernelTable& table) {
  const int d = static_cast<int>(dtype_of<T>::value);
  auto at = [&](Strategy s) -> LinearKernel& { return kernel_of(table, s, Encoding::plain, dtype_of<T>::value); };
  constexpr std::int64_t kLanes = 16 * kMaxLanes;
  at(Strategy::tile_rows) = {Panel::blocks_f32, 2 * kTileRows, kMaxBatch, 1, no_scratch, tile_rows<T>};
  at(Strategy::tile_dense) = {Panel::blocks_f32, kTileRows, kDenseBatch, 1, tile_dense_scratch, tile_dense<T>};
  at(Strategy::tile_batch) = {Panel::blocks_f32, kTileRows, kLanes, 16, tile_batch_scratch, tile_batch<T>};
  at(Strategy::csr_gather) = {Panel::rows_f32, 1, 1, 1, no_scratch, csr_gather<T>};
  at(Strategy::csr_batch) = {Panel::blocks_f32, 1, kLanes, 16, no_scratch, csr_batch<T>};
  table.panel[static_cast<int>(Panel::rows_f32)][d] = pack_rows_f32<T>;
  table.panel[static_cast<int>(Panel::blocks_f32)][d] = pack_blocks_f32<T>;
  table.threshold[d] = threshold<T>;
  table.round.values[d] = round_values<T>;
  table.round.gradients[d] = round_gradients<T>;
}

inline void install_all(KernelTable& table) {
  install_type<float>(table);
  install_type<bf16>(table);
  install_type<f16>(table);
  table.words16 = word_kernels<std::uint16_t>();
  table.words32 = word_kernels<std::uint32_t>();
  table.round.codes = round_codes;
  table.bf16_interleave = 1;
}
