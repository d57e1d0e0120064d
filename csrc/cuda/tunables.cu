#include <array>
#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

#include "moe_route/cuda.h"
#include "tunables.h"

namespace moe_route::cuda {
namespace {

constexpr int kEntries = static_cast<int>(Tunable::kCount);
constexpr int64_t kNever = int64_t{1} << 62;

struct Entry {
  const char* name;
  int64_t usual, least, most;
  const char* meaning;
};

// In the order of Tunable.
constexpr Entry kTable[] = {
    {"gate.tiles_from", 12288, 0, kNever, "rows from which the gate gives each row a thread and not a warp"},
    {"gate.blocks", 32, 1, 64, "blocks of the gate for each multiprocessor, at most"},
    {"gate.level", 0, 0, 3, "lowest level of the gate: 0 plain, 1 scored, 2 soft, 3 full"},
    {"gate.common", 1, 0, 1, "kernels of their own for the common router"},
    {"gate.registers", 1, 0, 1, "rows of up to 512 experts in registers, not in shared memory"},
    {"gate.block_row", 1, 0, 1, "statistics of a block added up in shared memory first"},
    {"dispatch.alone", 512, 0, 4096, "slots up to which dispatch takes one small block"},
    {"dispatch.one_launch", 4096, 0, 1 << 20, "slots up to which dispatch takes one launch"},
    {"dispatch.tile", 512, 1, 1 << 20, "slots of a block of dispatch, at least"},
    {"dispatch.long_tile", 8192, 1, 1 << 20, "slots of a block from which a multiprocessor gets two blocks"},
    {"dispatch.spans", 512, 1, 4096, "spans that dispatch counts, at most"},
    {"experts.columns", 8, 1, 64, "columns of a warp in products of experts, at most"},
    {"rows.blocks", 64, 1, 1024, "blocks of permute and combine for each multiprocessor, at most"},
    {"pdl", 0, 0, 1, "kernels begin while the ones before them end, from compute capability 9.0 on"},
};
static_assert(sizeof(kTable) / sizeof(Entry) == kEntries);

std::string names() {
  std::string list;
  for (const Entry& entry : kTable) list += (list.empty() ? "" : ", ") + std::string(entry.name);
  return list;
}

class Values {
 public:
  Values() {
    for (int i = 0; i < kEntries; ++i) values_[i] = kTable[i].usual;
    const char* const said = std::getenv("MOE_ROUTE_TUNING");
    std::istringstream list(said == nullptr ? "" : said);
    for (std::string part; std::getline(list, part, ',');) read(part);
  }

  int64_t get(int which) const { return values_[which].load(std::memory_order_relaxed); }

  void set(const std::string& name, int64_t value) {
    for (int i = 0; i < kEntries; ++i) {
      const Entry& entry = kTable[i];
      if (name != entry.name) continue;
      if (value < entry.least || value > entry.most) {
        throw std::invalid_argument("moe_route: " + name + " is " + std::to_string(value) + "; it takes " +
                                    std::to_string(entry.least) + " to " + std::to_string(entry.most));
      }
      values_[i].store(value, std::memory_order_relaxed);
      return;
    }
    throw std::invalid_argument("moe_route: there is no tunable '" + name + "'; there are " + names());
  }

 private:
  void read(const std::string& part) {
    const size_t equals = part.find('=');
    size_t digits = 0;
    int64_t value = 0;
    if (equals != std::string::npos) {
      try {
        value = std::stoll(part.substr(equals + 1), &digits);
      } catch (const std::logic_error&) {  // no number, or one that is too large
        digits = 0;
      }
    }
    if (digits == 0 || equals + 1 + digits != part.size()) {
      throw std::invalid_argument("moe_route: MOE_ROUTE_TUNING holds '" + part +
                                  "'; it takes name=number, separated by commas");
    }
    set(part.substr(0, equals), value);
  }

  std::array<std::atomic<int64_t>, kEntries> values_;
};

Values& values() {
  static Values all;  // a constructor that throws is tried again by the next call
  return all;
}

}  // namespace

int64_t tuned(Tunable which) { return values().get(static_cast<int>(which)); }

void tune(const std::string& name, int64_t value) { values().set(name, value); }

std::vector<TunableFacts> tunables() {
  std::vector<TunableFacts> all;
  for (int i = 0; i < kEntries; ++i) {
    const Entry& entry = kTable[i];
    all.push_back({entry.name, entry.meaning, entry.usual, entry.least, entry.most, values().get(i)});
  }
  return all;
}

}  // namespace moe_route::cuda
