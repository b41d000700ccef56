// The operations of namespace avsf: checks, allocation, and the order of the primitives. One code for CPU and CUDA.
// Legend: N clips, C channels, T frames, G groups. Definitions: kernels/definition.py; shapes: kernels/ops.py.
#include "boxed.h"
#include "tensors.h"

namespace avsf {
namespace {

struct Norm {  // one normalisation: given statistics if mean is present, else those of the batch
  MaybeTensor weight, bias, mean, variance;
  double eps;
};

template <class D>
void stats_into(const D& device, const Tensor& x, const Geometry& g, View from, float* out) {
  const Tensor work = floats({device.p.scratch(g)}, x);
  device.p.stats(device.stream, element_type(x), g, from, data(work), out, nullptr);
}

template <class D>
Tensor bn_stats(const Tensor& x, int64_t groups) {
  const D device(x);
  const View from = view(x, "x");
  const Geometry g = clips(x, groups);
  const Tensor out = floats({groups, 3, x.size(1)}, x);
  stats_into(device, x, g, from, data(out));
  return out;
}

template <class D>
Tensor bn_finalize(const Tensor& stats, MaybeTensor weight, MaybeTensor bias, double eps) {
  const D device(stats);
  STD_TORCH_CHECK(stats.dim() == 3 && stats.size(1) == 3, "avsf: stats must be (G, 3, C) from bn_stats");
  const int64_t groups = stats.size(0), channels = stats.size(2);
  const Tensor coef = floats({kCoefRows, groups, channels}, stats);
  const Finish finish = {parameter(weight, stats, channels, "weight"), parameter(bias, stats, channels, "bias"), eps,
                         data(coef), groups * channels};
  device.p.finalize(device.stream, parameter(stats, stats, groups * 3 * channels, "stats"), groups, channels, finish);
  return coef;
}

void set_audio(ApplyArgs& args, const Tensor& audio, const MaybeTensor& keep, const Tensor& x, int64_t first) {
  STD_TORCH_CHECK(x.dim() == 5 && audio.dim() == 3 && audio.size(0) == x.size(0) && audio.size(2) == x.size(2) &&
                      audio.size(1) >= first + x.size(1) && dtype(audio) == dtype(x) &&
                      same_device(audio, x),
                  "avsf: audio must be (N, C, T) with the dtype and device of the data");
  args.audio_clip = audio.stride(0), args.audio_channel = audio.stride(1), args.audio_frame = audio.stride(2);
  args.audio = static_cast<const char*>(audio.data_ptr()) + first * audio.stride(1) * type_bytes(element_type(x));
  args.keep = kept_clips(keep, x);
}

ApplyArgs apply_args(const Tensor& x, const MaybeTensor& coef, const MaybeTensor& residual,
                     const MaybeTensor& residual_coef, int64_t groups, bool relu) {
  ApplyArgs args;
  args.x = view(x, "x");
  if (residual) check_like(*residual, x, "residual");
  STD_TORCH_CHECK(residual || !residual_coef, "avsf: residual coefficients without a residual");
  STD_TORCH_CHECK(coef || !residual, "avsf: a residual needs coefficients for x");
  args.residual = view(residual, "residual");
  args.coef = coefficients(coef, x, groups);
  args.residual_coef = coefficients(residual_coef, x, groups);
  args.relu = relu;
  return args;
}

int64_t groups_of(const MaybeTensor& a, const MaybeTensor& b) {
  return std::max(a ? coef_groups(*a) : 1, b ? coef_groups(*b) : 1);
}

template <class D>
std::tuple<Tensor, Tensor> bn_act(const Tensor& x, const Tensor& coef, MaybeTensor residual, MaybeTensor residual_coef,
                                  MaybeTensor audio, MaybeTensor keep, bool relu) {
  const D device(x);
  const int64_t groups = groups_of(coef, residual_coef);
  ApplyArgs args = apply_args(x, coef, residual, residual_coef, groups, relu);
  if (audio) set_audio(args, *audio, keep, x, 0);
  const Tensor out = channels_last(sizes_of(x), x);
  const Tensor mask = mask_like(x, relu && residual);
  args.out = view(out, "out");
  if (mask.numel()) args.mask = static_cast<uint8_t*>(mask.data_ptr());
  const Geometry g = audio ? frames(x, groups) : clips(x, groups);
  device.p.apply(device.stream, element_type(x), &g, &args, 1);
  return {out, mask};
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> lateral_cat(const Tensor& slow, MaybeTensor slow_coef, MaybeTensor residual,
                                               MaybeTensor residual_coef, const Tensor& lateral,
                                               const Tensor& lateral_coef, MaybeTensor audio, MaybeTensor keep) {
  const D device(slow);
  STD_TORCH_CHECK(slow.dim() == 5 && lateral.dim() == 5 && dtype(slow) == dtype(lateral) &&
                      same_device(slow, lateral),
                  "avsf: slow and lateral must be (N, C, T, H, W) of one dtype and device");
  for (int64_t i : {0, 2, 3, 4})
    STD_TORCH_CHECK(slow.size(i) == lateral.size(i), "avsf: slow and lateral must agree except in channels");
  const int64_t groups[2] = {groups_of(slow_coef, residual_coef), coef_groups(lateral_coef)};
  ApplyArgs args[2] = {apply_args(slow, slow_coef, residual, residual_coef, groups[0], bool(slow_coef)),
                       apply_args(lateral, lateral_coef, std::nullopt, std::nullopt, groups[1], true)};
  const int64_t first = slow.size(1);
  const Tensor out = channels_last({slow.size(0), first + lateral.size(1), slow.size(2), slow.size(3), slow.size(4)}, slow);
  const Tensor slow_mask = mask_like(slow, bool(residual)), lateral_mask = mask_like(lateral, false);
  args[0].out = args[1].out = view(out, "out");
  args[1].out.data += first * type_bytes(element_type(slow));
  if (slow_mask.numel()) args[0].mask = static_cast<uint8_t*>(slow_mask.data_ptr());
  if (audio) {
    STD_TORCH_CHECK(audio->dim() == 3 && audio->size(1) == first + lateral.size(1),
                    "avsf: audio must have the channels of the concat");
    set_audio(args[0], *audio, keep, slow, 0);
    set_audio(args[1], *audio, keep, lateral, first);
  }
  const Geometry g[2] = {frames(slow, groups[0]), frames(lateral, groups[1])};
  device.p.apply(device.stream, element_type(slow), g, args, 2);
  return {out, slow_mask, lateral_mask};
}

BackwardArgs backward_args(const Tensor& dy, const Tensor& x, const MaybeTensor& residual, const Tensor& mask,
                           const Tensor& coef, const MaybeTensor& residual_coef, int64_t groups, bool relu,
                           bool want_residual) {
  check_like(dy, x, "dy");
  if (residual) check_like(*residual, x, "residual");
  STD_TORCH_CHECK(residual || !residual_coef, "avsf: residual coefficients without a residual");
  BackwardArgs args;
  args.dy = view(dy, "dy"), args.x = view(x, "x"), args.residual = view(residual, "residual");
  args.coef = coefficients(coef, x, groups);
  args.residual_coef = coefficients(residual_coef, x, groups);
  args.relu = relu;
  if (mask.numel()) {
    STD_TORCH_CHECK(mask.numel() == x.numel() / x.size(1) * ((x.size(1) + 7) / 8) && mask.is_contiguous() &&
                        dtype(mask) == aoti_torch_dtype_uint8() && same_device(mask, x),
                    "avsf: mask must come from the forward operation of this input, on its device");
    args.mask = static_cast<const uint8_t*>(mask.data_ptr());
  }
  STD_TORCH_CHECK(args.mask || !relu || !(residual || want_residual),
                  "avsf: a rectified residual and its gradient need the forward's mask");
  return args;
}

template <class D>
Tensor bn_act_bwd_reduce(const Tensor& dy, const Tensor& x, MaybeTensor residual, const Tensor& mask, const Tensor& coef,
                         MaybeTensor residual_coef, int64_t groups, bool relu) {
  const D device(x);
  BackwardArgs args = backward_args(dy, x, residual, mask, coef, residual_coef, groups, relu, false);
  const Geometry g = clips(x, groups);
  const Tensor sums = floats({groups, 3, x.size(1)}, x), work = floats({device.p.scratch(g)}, x);
  args.sums = data(sums);
  device.p.reduce(device.stream, element_type(x), g, args, data(work));
  return sums;
}

template <class D>
std::tuple<Tensor, Tensor> bn_act_bwd_apply(const Tensor& dy, const Tensor& x, MaybeTensor residual, const Tensor& mask,
                                            const Tensor& coef, MaybeTensor residual_coef, const Tensor& sums, bool relu,
                                            bool want_residual) {
  const D device(x);
  const int64_t groups = sums_groups(sums);
  const Geometry g = clips(x, groups);
  BackwardArgs args = backward_args(dy, x, residual, mask, coef, residual_coef, groups, relu, want_residual);
  parameter(sums, x, groups * 3 * x.size(1), "sums");
  args.sums = data(sums);
  const Tensor dx = channels_last(sizes_of(x), x);
  const Tensor dresidual = want_residual ? channels_last(sizes_of(x), x) : allocate({0}, {1}, dtype(x), x);
  args.dx = view(dx, "dx");
  if (want_residual) args.dresidual = view(dresidual, "dresidual");
  device.p.input_grad(device.stream, element_type(x), g, args);
  return {dx, dresidual};
}

template <class D>
Tensor frame_sum(const Tensor& dy, MaybeTensor keep) {
  const D device(dy);
  const View from = view(dy, "dy");
  const Geometry g = frames(dy, 1);
  const int64_t c = dy.size(1), t = dy.size(2);
  const Tensor out = allocate({dy.size(0), c, t}, {c * t, t, 1}, dtype(dy), dy);
  device.p.frame_sum(device.stream, element_type(dy), g, from, kept_clips(keep, dy), static_cast<char*>(out.data_ptr()));
  return out;
}

template <class D>
void running_stats_update_(std::vector<Tensor> mean, std::vector<Tensor> variance, std::vector<Tensor> batches,
                           std::vector<Tensor> stats, double momentum) {
  STD_TORCH_CHECK(mean.size() == stats.size() && variance.size() == stats.size() && batches.size() == stats.size(),
                  "avsf: running statistics need one mean, variance and counter per stats");
  if (stats.empty()) return;
  const D device(stats[0]);
  std::vector<Update> updates;
  for (size_t i = 0; i < stats.size(); ++i) {
    const Tensor& s = stats[i];
    STD_TORCH_CHECK(s.dim() == 3 && s.size(0) >= 1 && s.size(1) == 3, "avsf: stats must be (G, 3, C) from bn_stats");
    STD_TORCH_CHECK(dtype(batches[i]) == aoti_torch_dtype_int64() && batches[i].numel() == 1,
                    "avsf: the counter must be one int64 value");
    parameter(s, stats[0], s.numel(), "stats");
    parameter(mean[i], stats[0], s.size(2), "running mean");
    parameter(variance[i], stats[0], s.size(2), "running variance");
    STD_TORCH_CHECK(same_device(batches[i], s), "avsf: the counter must be on the device of the stats");
    updates.push_back({data(mean[i]), data(variance[i]), static_cast<int64_t*>(batches[i].data_ptr()), data(s), s.size(0),
                       s.size(2)});
  }
  device.p.update(device.stream, updates.data(), static_cast<int64_t>(updates.size()), momentum);
}

#include "composites.inc"

template <class D>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("bn_stats", AVSF_BOX(bn_stats<D>));
  m.impl("bn_finalize", AVSF_BOX(bn_finalize<D>));
  m.impl("bn_act", AVSF_BOX(bn_act<D>));
  m.impl("lateral_cat", AVSF_BOX(lateral_cat<D>));
  m.impl("bn_act_bwd_reduce", AVSF_BOX(bn_act_bwd_reduce<D>));
  m.impl("bn_act_bwd_apply", AVSF_BOX(bn_act_bwd_apply<D>));
  m.impl("frame_sum", AVSF_BOX(frame_sum<D>));
  m.impl("running_stats_update_", AVSF_BOX(running_stats_update_<D>));
  m.impl("norm_act", AVSF_BOX(norm_act<D>));
  m.impl("norm_act_backward", AVSF_BOX(norm_act_backward<D>));
  m.impl("lateral_fuse", AVSF_BOX(lateral_fuse<D>));
  m.impl("bn_relu_maxpool", AVSF_BOX(bn_relu_maxpool<D>));
  m.impl("bn_relu_maxpool_bwd_apply", AVSF_BOX(bn_relu_maxpool_bwd_apply<D>));
  m.impl("norm_pool", AVSF_BOX(norm_pool<D>));
  m.impl("norm_pool_backward", AVSF_BOX(norm_pool_backward<D>));
}

}  // namespace
}  // namespace avsf

STABLE_TORCH_LIBRARY_IMPL(avsf, CPU, m) { avsf::implement<avsf::CpuDevice>(m); }
#ifdef AVSF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(avsf, CUDA, m) { avsf::implement<avsf::CudaDevice>(m); }
#endif
