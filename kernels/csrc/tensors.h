// Tensors of the stable ABI: checks, views, allocation.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "device.h"

namespace avsf {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int32_t device_type(const Tensor& t) {
  int32_t type;
  AVSF_TORCH(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return device_type(a) == device_type(b) && a.get_device_index() == b.get_device_index();
}

inline int32_t dtype(const Tensor& t) {
  int32_t type;
  AVSF_TORCH(aoti_torch_get_dtype(t.get(), &type));
  return type;
}

inline Type element_type(const Tensor& t) {
  const int32_t d = dtype(t);
  STD_TORCH_CHECK(d == aoti_torch_dtype_float32() || d == aoti_torch_dtype_bfloat16() || d == aoti_torch_dtype_float16(),
                  "avsf: data must be float32, bfloat16 or float16; use the reference backend for other types");
  return d == aoti_torch_dtype_float32() ? Type::kFloat32
                                         : (d == aoti_torch_dtype_bfloat16() ? Type::kBFloat16 : Type::kFloat16);
}

inline Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype,
                       const Tensor& like) {
  AtenTensorHandle handle;
  AVSF_TORCH(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         dtype, device_type(like), like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor floats(const std::vector<int64_t>& sizes, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes[i]) strides[i] = step;
  return allocate(sizes, strides, aoti_torch_dtype_float32(), like);
}

inline Tensor channels_last(std::vector<int64_t> sizes, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = sizes[1];
  strides[1] = 1;
  for (size_t i = sizes.size(); i-- > 2; step *= sizes[i]) strides[i] = step;
  strides[0] = step;
  return allocate(sizes, strides, dtype(like), like);
}

// [N*P, ceil(C/8)] bytes, or no bytes where no mask is needed.
inline Tensor mask_like(const Tensor& x, bool wanted) {
  const int64_t width = (x.size(1) + 7) / 8, rows = wanted ? x.numel() / x.size(1) : 0;
  return allocate({rows, width}, {width, 1}, aoti_torch_dtype_uint8(), x);
}

// The layout rule of kernels/layout.py, in C++: evenly spaced positions, channels innermost.
inline View view(const Tensor& t, const char* name) {
  const auto sizes = t.sizes(), strides = t.strides();
  const size_t dim = sizes.size();
  bool good = (dim == 4 || dim == 5) && t.numel() > 0 && (sizes[1] == 1 || strides[1] == 1);
  int64_t row = 0, expected = 0;
  for (size_t axis = dim; good && axis-- > 2;) {
    if (sizes[axis] == 1) continue;
    if (row == 0) row = expected = strides[axis];
    good = strides[axis] == expected && row >= sizes[1];
    expected *= sizes[axis];
  }
  if (row == 0) row = expected = sizes[1];
  good = good && (sizes[0] == 1 || strides[0] >= std::max(expected, sizes[1]));
  STD_TORCH_CHECK(good, "avsf: ", name, " must be a non-empty channels_last or channels_last_3d tensor (stride(1) == 1, ",
                  "dense positions); call .to(memory_format=torch.channels_last_3d) where it is made");
  return {static_cast<char*>(t.data_ptr()), sizes[0] == 1 ? expected : strides[0], row};
}

inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline View view(const MaybeTensor& t, const char* name) { return t ? view(*t, name) : View(); }

inline Geometry clips(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK((x.dim() == 4 || x.dim() == 5) && x.numel() > 0,
                  "avsf: data must be a non-empty (N, C, T, H, W) or (N, C, H, W) tensor");
  STD_TORCH_CHECK(groups >= 1 && x.size(0) % groups == 0, "avsf: ", x.size(0), " clips must be a multiple of ", groups,
                  " groups");
  return {x.size(0), 1, x.size(0) / groups, x.numel() / x.size(0) / x.size(1), x.size(1), groups};
}

// One frame is one unit: audio differs between frames.
inline Geometry frames(const Tensor& x, int64_t groups) {
  Geometry g = clips(x, groups);
  STD_TORCH_CHECK(x.dim() == 5, "avsf: audio needs (N, C, T, H, W) data");
  g.units_per_clip = x.size(2), g.units = x.size(0) * x.size(2), g.rows /= x.size(2);
  return g;
}

inline void check_like(const Tensor& a, const Tensor& b, const char* name) {
  bool same = a.dim() == b.dim() && dtype(a) == dtype(b) && same_device(a, b);
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  STD_TORCH_CHECK(same, "avsf: ", name, " must have the shape, dtype and device of the data");
}

inline const float* parameter(const MaybeTensor& t, const Tensor& x, int64_t size, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(dtype(*t) == aoti_torch_dtype_float32() && t->is_contiguous() && t->numel() == size &&
                      same_device(*t, x),
                  "avsf: ", name, " must be ", size, " contiguous float32 values on the device of the data");
  return static_cast<const float*>(t->data_ptr());
}

// (N,) bool: which clips' audio counts; null where all do.
inline const bool* kept_clips(const MaybeTensor& keep, const Tensor& x) {
  if (!keep) return nullptr;
  STD_TORCH_CHECK(dtype(*keep) == aoti_torch_dtype_bool() && keep->is_contiguous() && keep->numel() == x.size(0) &&
                      same_device(*keep, x),
                  "avsf: keep must be ", x.size(0), " contiguous bool values on the device of the data");
  return static_cast<const bool*>(keep->data_ptr());
}

inline float* data(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

inline int64_t coef_groups(const Tensor& coef) {
  STD_TORCH_CHECK(coef.dim() == 3 && coef.size(0) == kCoefRows, "avsf: coefficients must be (5, G, C) from bn_finalize");
  return coef.size(1);
}

inline int64_t sums_groups(const Tensor& sums) {
  STD_TORCH_CHECK(sums.dim() == 3 && sums.size(1) == 3, "avsf: sums must be (G, 3, C) from bn_act_bwd_reduce");
  return sums.size(0);
}

inline Coef coefficients(const MaybeTensor& coef, const Tensor& x, int64_t groups) {
  if (!coef) return {};
  const int64_t own = coef_groups(*coef);
  STD_TORCH_CHECK(own == groups || own == 1, "avsf: coefficients of ", own, " groups do not fit ", groups, " groups");
  return {parameter(coef, x, kCoefRows * own * x.size(1), "coefficients"), own * x.size(1)};
}

}  // namespace avsf
