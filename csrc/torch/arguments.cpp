#include "arguments.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "moe_route/dispatch.h"

namespace moe_route {
namespace {

std::string shape_text(Shape shape) {
  std::ostringstream text;
  text << '[';
  const char* comma = "";
  for (int64_t size : shape) {
    text << comma << (size < 0 ? "any" : std::to_string(size));
    comma = ", ";
  }
  text << ']';
  return text.str();
}

bool fits(const Tensor& tensor, Shape shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t d = 0;
  for (int64_t want : shape) {
    if (const int64_t size = tensor.size(d++); want >= 0 && size != want) return false;
  }
  return true;
}

int32_t device_type(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

int32_t device_index(const Tensor& tensor) {
  int32_t index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  return index;
}

// Where the last element of a tensor that is not empty lies, from its first one.
int64_t last_element(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return last;
}

}  // namespace

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

Place place_of(const char* name, const Tensor& tensor) {
  Place place;
  place.leader = name;
  place.type = device_type(tensor);
  place.cpu = place.type == aoti_torch_device_type_cpu();
  if (!place.cpu) place.index = device_index(tensor);
  return place;
}

void check_place(const char* name, const Tensor& tensor, const Place& place) {
  const int32_t type = device_type(tensor);
  if (type == place.type && (place.cpu || device_index(tensor) == place.index)) return;
  const bool known = type == aoti_torch_device_type_cpu() || type == aoti_torch_device_type_cuda();
  const std::string where = known ? place_of(name, tensor).name() : "another device";
  refuse(name, " (on ", where, ") and ", place.leader, " (on ", place.name(),
         ") must be on one device; move ", name, " with .to('", place.name(), "')");
}

void check_storage(const char* name, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  bool empty = false;
  for (const int64_t size : sizes) {
    if (size > kMaxRows)
      refuse(name, " has shape ", shape_text(tensor), "; sizes up to ", kMaxRows, " are supported");
    empty |= size == 0;
  }
  if (empty) return;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  if (bytes == 0) {
    refuse(name,
           " has no memory: its storage was freed (untyped_storage().resize_(0), as FSDP does with shards); "
           "use it before it is freed, or make it anew");
  }
  const int64_t end =
      (tensor.storage_offset() + last_element(tensor) + 1) * static_cast<int64_t>(tensor.element_size());
  if (end > bytes) {
    refuse(name, " ends at byte ", end, " of a storage of ", bytes,
           ": it was resized (untyped_storage().resize_); use it before that, or make it anew");
  }
}

void check_apart(const char* name, const MaybeTensor& written, const char* other_name,
                 const MaybeTensor& other) {
  if (!written || !other || written->numel() == 0 || other->numel() == 0) return;
  const auto first = [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  };
  const auto end = [&](const Tensor& tensor) {
    return first(tensor) + (last_element(tensor) + 1) * tensor.element_size();
  };
  if (first(*written) < end(*other) && first(*other) < end(*written))
    refuse(name, " shares memory with ", other_name, "; give it memory of its own (.clone())");
}

void check_tensor(const char* name, const Tensor& tensor, Shape shape, const Place& place) {
  if (!fits(tensor, shape))
    refuse(name, " has shape ", shape_text(tensor), "; it must be ", shape_text(shape));
  check_place(name, tensor, place);
  if (!tensor.is_contiguous()) refuse(name, " is not contiguous; call .contiguous() on it first");
  check_storage(name, tensor);
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType want, const char* want_name) {
  if (tensor.scalar_type() != want)
    refuse(name, " must be ", want_name, "; convert it with .to(torch.", want_name, ")");
}

const float* float_table(const char* name, const MaybeTensor& tensor, Shape shape, const Place& place) {
  if (!tensor) return nullptr;
  check_tensor(name, *tensor, shape, place);
  check_dtype(name, *tensor, ScalarType::Float, "float32");
  return tensor->const_data_ptr<float>();
}

const int32_t* int_table(const char* name, const MaybeTensor& tensor, Shape shape, const Place& place) {
  if (!tensor) return nullptr;
  check_tensor(name, *tensor, shape, place);
  check_dtype(name, *tensor, ScalarType::Int, "int32");
  return tensor->const_data_ptr<int32_t>();
}

DType index_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    default:
      refuse(name, " must be int32 or int64");
  }
}

DType float_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      refuse(name, " must be float32, bfloat16, float16 or float64");
  }
}

int64_t element_size(DType type) {
  switch (type) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    default:
      return 2;
  }
}

Tensor packed(const char* name, const Tensor& tensor) {
  check_storage(name, tensor);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// aoti_torch_empty_strided is the cheapest allocation of the stable ABI.
Tensor allocate(Shape shape, int32_t dtype, const Place& place) {
  int64_t sizes[4], strides[4], stride = 1;
  const auto dims = static_cast<int64_t>(shape.size());
  std::copy(shape.begin(), shape.end(), sizes);
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    if (__builtin_mul_overflow(stride, std::max<int64_t>(sizes[d], 1), &stride))
      refuse("a result of more than 2^63 elements is asked for; give smaller tensors");
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, place.type, place.index, &handle));
  return Tensor(handle);
}

}  // namespace moe_route
