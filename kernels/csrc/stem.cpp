// The first convolutions as operations: checks and allocation. Definitions: kernels/stem.py, whose plain torch form serves
// the CPU. Legend: kernels/csrc/stem.h.
#include "stem.h"

#include "boxed.h"
#include "tensors.h"

#ifdef AVSF_WITH_CUDA
namespace avsf {
namespace {

StemGeometry stem_geometry(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 5 && x.size(1) == kStemPixel && element_type(x) != Type::kFloat32,
                  "avsf: frames must be (N, 4, T, H, W) in bfloat16 or float16");
  return {x.size(0), x.size(2), x.size(3), x.size(4), (x.size(3) + 1) / 2, (x.size(4) + 1) / 2};
}

View stem_view(const Tensor& x) {
  const View v = view(x, "frames");
  STD_TORCH_CHECK(v.row == kStemPixel && v.clip % kStemPixel == 0 && reinterpret_cast<uintptr_t>(v.data) % 8 == 0,
                  "avsf: frames must be dense pixels of four channels, aligned to 8 bytes");
  return v;
}

bool is_slow(const Tensor& weight) { return weight.dim() == 5 && weight.size(0) == kSlowStemOut; }

const StemPrimitives& primitives(const Tensor& weight) { return is_slow(weight) ? cuda_slow_stem() : cuda_stem(); }

StemWeight stem_weight(const Tensor& weight, const Tensor& x) {
  const bool slow = is_slow(weight);
  const int64_t sizes[5] = {slow ? kSlowStemOut : kStemOut, kStemIn, slow ? 1 : kStemTime, kStemSpace, kStemSpace};
  bool good = weight.dim() == 5 && same_device(weight, x);
  for (int i = 0; good && i < 5; ++i) good = weight.size(i) == sizes[i];
  STD_TORCH_CHECK(good, "avsf: weight must be (8, 3, 5, 7, 7) or (64, 3, 1, 7, 7) on the device of the frames");
  StemWeight w;
  w.data = static_cast<char*>(weight.data_ptr()), w.type = element_type(weight);
  for (int i = 0; i < 5; ++i) w.stride[i] = weight.stride(i);
  return w;
}

// Uninitialised, with sizes, strides and dtype of a weight whose memory has no holes.
Tensor weight_like(const Tensor& weight) {
  const std::vector<int64_t> sizes(weight.sizes().begin(), weight.sizes().end());
  const std::vector<int64_t> strides(weight.strides().begin(), weight.strides().end());
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  STD_TORCH_CHECK(last + 1 == weight.numel(), "avsf: weight must be dense");
  return allocate(sizes, strides, dtype(weight), weight);
}

Tensor workspace(int64_t bytes, const Tensor& like) {
  return allocate({bytes}, {1}, aoti_torch_dtype_uint8(), like);
}

Tensor stem_conv(const Tensor& frames, const Tensor& weight) {
  const CudaDevice device(frames);
  const StemGeometry g = stem_geometry(frames);
  const StemWeight w = stem_weight(weight, frames);
  const Tensor out = channels_last({g.clips, weight.size(0), g.frames, g.out_height, g.out_width}, frames);
  const Tensor work = workspace(primitives(weight).scratch(g, false), frames);
  const StemArgs args = {stem_view(frames), view(out, "out"), w, static_cast<char*>(work.data_ptr())};
  primitives(weight).forward(device.stream, element_type(frames), g, args);
  return out;
}

Tensor stem_conv_weight_grad(const Tensor& dy, const Tensor& frames, const Tensor& weight) {
  const CudaDevice device(frames);
  const StemGeometry g = stem_geometry(frames);
  stem_weight(weight, frames);
  const int64_t sizes[5] = {g.clips, weight.size(0), g.frames, g.out_height, g.out_width};
  bool good = dy.dim() == 5 && dtype(dy) == dtype(frames) && same_device(dy, frames);
  for (int i = 0; good && i < 5; ++i) good = dy.size(i) == sizes[i];
  STD_TORCH_CHECK(good, "avsf: dy must have the shape of the output, and the dtype and device of the frames");
  const Tensor out = weight_like(weight), work = workspace(primitives(weight).scratch(g, true), frames);
  const StemArgs args = {stem_view(frames), view(dy, "dy"), stem_weight(out, frames), static_cast<char*>(work.data_ptr())};
  primitives(weight).weight_grad(device.stream, element_type(frames), g, args);
  return out;
}

}  // namespace
}  // namespace avsf

STABLE_TORCH_LIBRARY_IMPL(avsf, CUDA, m) {
  m.impl("stem_conv", AVSF_BOX(avsf::stem_conv));
  m.impl("stem_conv_weight_grad", AVSF_BOX(avsf::stem_conv_weight_grad));
}
#endif
