// Dropout in place on some rows. cpu_dispatch.h compiles this file once for each instruction set.

#include "philox.h"

template <class Item>
static void drop(const Rows& job) {
  constexpr int64_t kPanel = 512;  // number of columns whose random bits are made at a time
  uint16_t random[kPanel + 8 * kLanes];
  for (int64_t row = job.begin; row < job.end; ++row) {
    Item* const items = (Item*)job.data + row * job.stride;
    for (int64_t panel = 0; panel < job.columns; panel += kPanel) {
      const int64_t left = job.columns - panel, count = left < kPanel ? left : kPanel;
      random_bits(random, job.seed, 0, 0, job.first + row * job.pitch + panel, count);
      for (int64_t j = 0; j < count; ++j)
        items[panel + j] = random[j] >= job.least ? items[panel + j] : Item{};
    }
  }
}

static Kernel kernel(int64_t item_bytes) {
  if (item_bytes == 2) return drop<uint16_t>;
  return item_bytes == 4 ? drop<uint32_t> : drop<uint64_t>;
}
