// The device of a call's tensors: that of its leading tensor (router logits, ids, x, rows). All others must
// be there too, what is made is made there, and the launch goes there.
#pragma once
#include <cstdint>
#include <string>

namespace moe_route {

struct Place {
  const char* leader = "";  // the argument that decides, for messages
  bool cpu = true;
  int32_t type = 0;  // torch's device type
  int32_t index = 0;

  std::string name() const { return cpu ? "cpu" : "cuda:" + std::to_string(index); }
};

}  // namespace moe_route
