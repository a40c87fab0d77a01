// Random bits: Philox4x32-7 with counter (element / 8, step, index) and key seed. The kernels that
// cpu_dispatch.h compiles include this file after simd.h; it has no include guard and no includes.

// Writes the bits of elements [first, first + count) from out + (first % 8) on, and returns that
// offset. `out` must have room for 8 * kLanes more elements.
static int random_bits(
    uint16_t* out, uint64_t seed, uint32_t step, uint32_t index, uint64_t first, int64_t count) {
  constexpr int kBlocks = kLanes / 2;  // each 64-bit lane holds a word; its high half is noise
  u64v keys[7][2], lane;
  for (int round = 0; round < 7; ++round) {
    keys[round][0] = u64v{} + ((uint32_t)seed + round * 0x9E3779B9u);
    keys[round][1] = u64v{} + ((uint32_t)(seed >> 32) + round * 0xBB67AE85u);
  }
  // The order in which store_pairs writes.
  for (int i = 0; i < kBlocks; ++i) lane[i] = i % 2 * (kBlocks / 2) + i / 2;
  const u64v factor0 = u64v{} + 0xD2511F53, factor1 = u64v{} + 0xCD9E8D57;
  const int offset = (int)(first % 8);
  u64v block = lane + first / 8;
  for (int64_t done = -offset; done < count; done += 8 * kBlocks, block += kBlocks) {
    u64v c0 = block, c1 = high_halves(block), c2 = u64v{} + step, c3 = u64v{} + index;
    for (const auto& key : keys) {
      const u64v product0 = multiply_low(c0, factor0), product1 = multiply_low(c2, factor1);
      c0 = high_halves(product1) ^ c1 ^ key[0];
      c2 = high_halves(product0) ^ c3 ^ key[1];
      c1 = product1;
      c3 = product0;
    }
    const u64v low = u64v{} + 0xFFFFFFFF;
    store_pairs((uint64_t*)out, (c0 & low) | (c1 << 32), (c2 & low) | (c3 << 32));
    out += 8 * kBlocks;
  }
  return offset;
}
