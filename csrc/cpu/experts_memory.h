// Scratch memory on whole cache lines, not initialized.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

namespace moe_route::cpu::MOE_ROUTE_ISA {
namespace {

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
template <class T>
using Memory = std::unique_ptr<T[], FreeAligned>;

template <class T>
Memory<T> memory(int64_t count) {
  return Memory<T>(
      static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64})));
}

}  // namespace
}  // namespace moe_route::cpu::MOE_ROUTE_ISA
