// What every operator does with its arguments: checks that name the argument and the mend (ValueError), the
// types of gate.h, and new tensors on the device of the call.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "moe_route/gate.h"
#include "place.h"

namespace moe_route {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;  // -1: any

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

std::string shape_text(const Tensor& tensor);

// Where `tensor`, the argument `name`, lies.
Place place_of(const char* name, const Tensor& tensor);

// Refuses a tensor that lies elsewhere than the call's leading tensor.
void check_place(const char* name, const Tensor& tensor, const Place& place);

// The memory of `tensor`: sizes whose products fit 64 bits, and a storage that holds every element. Freed, it has a shape
// and no memory: it is refused, and not taken for an absent one.
void check_storage(const char* name, const Tensor& tensor);

// Refuses a tensor that is written to and shares memory with another of the call.
void check_apart(const char* name, const MaybeTensor& written, const char* other_name,
                 const MaybeTensor& other);

// Shape, contiguity, place and memory of the tensor `name`.
void check_tensor(const char* name, const Tensor& tensor, Shape shape, const Place& place);
void check_dtype(const char* name, const Tensor& tensor, ScalarType want, const char* want_name);

// Addresses of checked tables, null where there is none.
const float* float_table(const char* name, const MaybeTensor& tensor, Shape shape, const Place& place);
const int32_t* int_table(const char* name, const MaybeTensor& tensor, Shape shape, const Place& place);

DType index_type(const char* name, const Tensor& tensor);
DType float_type(const char* name, const Tensor& tensor);
int64_t element_size(DType type);

// The tensor `name` itself, or a contiguous copy.
Tensor packed(const char* name, const Tensor& tensor);

// torch's code for the dtype of `tensor`, as `allocate` takes it.
int32_t dtype_of(const Tensor& tensor);

// Uninitialized, contiguous.
Tensor allocate(Shape shape, int32_t dtype, const Place& place);

}  // namespace moe_route
