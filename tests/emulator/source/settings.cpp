#include "settings.h"

#include <charconv>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace emulator {
namespace {

bool to_number(std::string_view text, uint64_t& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc{} && end == text.data() + text.size();
}

[[noreturn]] void refuse(const char* name, std::string_view value, const char* takes) {
  throw std::invalid_argument(std::string(name) + " is '" + std::string(value) + "'; it takes " + takes);
}

int read_count(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return otherwise;
  uint64_t number = 0;
  if (!to_number(value, number) || number < 1 || number > 1024)
    refuse(name, value, "a number from 1 to 1024");
  return static_cast<int>(number);
}

}  // namespace

Settings read_settings() {
  Settings settings;
  settings.os_threads = read_count("MOE_ROUTE_EMULATOR_THREADS", settings.os_threads);
  settings.multiprocessors = read_count("MOE_ROUTE_EMULATOR_MULTIPROCESSORS", settings.multiprocessors);
  const char* loaded_only = std::getenv("MOE_ROUTE_EMULATOR_LOADED_ONLY");
  settings.loaded_only = loaded_only != nullptr && std::string_view(loaded_only) == "1";
  const char* name = "MOE_ROUTE_EMULATOR_ORDER";
  const char* value = std::getenv(name);
  const std::string_view order = value == nullptr ? "" : value;
  if (order == "reverse") {
    settings.order = Order::kReverse;
  } else if (order != "" && order != "forward") {
    settings.order = Order::kRandom;
    if (!to_number(order, settings.seed)) refuse(name, order, "forward, reverse or a seed (a number)");
  }
  return settings;
}

}  // namespace emulator
