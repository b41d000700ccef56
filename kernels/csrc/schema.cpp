// The operations of namespace avsf; definitions and shapes: kernels/ops.py and kernels/stem.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(avsf, m) {
  m.def("bn_stats(Tensor x, int groups) -> Tensor");
  m.def("bn_finalize(Tensor stats, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def("bn_act(Tensor x, Tensor coef, Tensor? residual, Tensor? residual_coef, Tensor? audio, Tensor? keep, bool relu) "
        "-> (Tensor, Tensor)");
  m.def("lateral_cat(Tensor slow, Tensor? slow_coef, Tensor? residual, Tensor? residual_coef, Tensor lateral, "
        "Tensor lateral_coef, Tensor? audio, Tensor? keep) -> (Tensor, Tensor, Tensor)");
  m.def("bn_act_bwd_reduce(Tensor dy, Tensor x, Tensor? residual, Tensor mask, Tensor coef, Tensor? residual_coef, "
        "int groups, bool relu) -> Tensor");
  m.def("bn_act_bwd_apply(Tensor dy, Tensor x, Tensor? residual, Tensor mask, Tensor coef, Tensor? residual_coef, "
        "Tensor sums, bool relu, bool want_residual) -> (Tensor, Tensor)");
  m.def("frame_sum(Tensor dy, Tensor? keep) -> Tensor");
  m.def("running_stats_update_(Tensor(a!)[] mean, Tensor(b!)[] variance, Tensor(c!)[] batches, Tensor[] stats, "
        "float momentum) -> ()");
  m.def("norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, float eps, Tensor? residual, "
        "Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean, Tensor? residual_variance, "
        "float residual_eps, bool project, int groups, bool relu, bool blocked) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("norm_act_backward(Tensor dy, Tensor? dy2, Tensor x, Tensor? residual, Tensor mask, Tensor coef, "
        "Tensor? residual_coef, int groups, bool relu, bool want_residual, bool blocked) -> (Tensor, Tensor, Tensor)");
  m.def("lateral_fuse(Tensor slow, Tensor lateral, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, "
        "float eps, Tensor? audio, Tensor? keep, int groups) -> (Tensor, Tensor, Tensor)");
  m.def("bn_relu_maxpool(Tensor x, Tensor coef, bool record) -> (Tensor, Tensor, Tensor)");
  m.def("bn_relu_maxpool_bwd_apply(Tensor dy, Tensor x, Tensor tap, Tensor coef, Tensor sums) -> Tensor");
  m.def("norm_pool(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, float eps, int groups, "
        "bool record) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("norm_pool_backward(Tensor dy, Tensor x, Tensor value, Tensor tap, Tensor coef, int groups) -> (Tensor, Tensor)");
  m.def("stem_conv(Tensor frames, Tensor weight) -> Tensor");
  m.def("stem_conv_weight_grad(Tensor dy, Tensor frames, Tensor weight) -> Tensor");
}
