// Coefficients from statistics, and running statistics.
#include "cuda_stats.cuh"

namespace avsf {
namespace cuda {
namespace {

__global__ void finalize_kernel(const float* __restrict__ stats, int64_t channels, const Finish finish) {
  const int64_t channel = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x, group = blockIdx.y;
  if (channel >= channels) return;
  const float* from = stats + group * 3 * channels + channel;
  const double n = from[0];
  write_coef(finish, group * channels + channel, channel, from[channels], from[2 * channels] / n, 1.0 / n);
}

__global__ void given_kernel(const float* __restrict__ mean, const float* __restrict__ variance, int64_t channels,
                             const Finish finish) {
  const int64_t channel = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (channel < channels) write_coef(finish, channel, channel, mean[channel], variance[channel], 0.0);
}

constexpr int kUpdatesPerLaunch = 80;  // what fits into the 4 KiB of arguments that every driver takes
struct Updates {
  Update item[kUpdatesPerLaunch];
};

__global__ void update_kernel(const __grid_constant__ Updates updates, double momentum) {
  const Update& u = updates.item[blockIdx.y];
  const int64_t channel = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (channel == 0) ++*u.batches;
  if (channel >= u.channels) return;
  double total = 0, mean = 0, squares = 0;
  for (int64_t g = 0; g < u.groups; ++g) {
    const float* from = u.stats + g * 3 * u.channels + channel;
    const double n = from[0], delta = from[u.channels] - mean;
    squares += from[2 * u.channels] + delta * delta * total * n / (total + n);
    mean += delta * n / (total + n);
    total += n;
  }
  const double variance = squares / fmax(total - 1.0, 1.0);
  u.mean[channel] = static_cast<float>(u.mean[channel] + momentum * (mean - u.mean[channel]));
  u.variance[channel] = static_cast<float>(u.variance[channel] + momentum * (variance - u.variance[channel]));
}

}  // namespace

void finalize(void* stream, const float* stats, int64_t groups, int64_t channels, const Finish& finish) {
  const dim3 blocks(static_cast<unsigned>((channels + kThreads - 1) / kThreads), static_cast<unsigned>(groups));
  finalize_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(stats, channels, finish);
  check_launch("finalize");
}

void given(void* stream, const float* mean, const float* variance, const float* weight, const float* bias, double eps,
           int64_t channels, float* coef) {
  const Finish finish = {weight, bias, eps, coef, channels};
  const unsigned blocks = static_cast<unsigned>((channels + kThreads - 1) / kThreads);
  given_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(mean, variance, channels, finish);
  check_launch("given");
}

void update(void* stream, const Update* updates, int64_t count, double momentum) {
  for (int64_t start = 0; start < count; start += kUpdatesPerLaunch) {
    const int64_t n = std::min<int64_t>(kUpdatesPerLaunch, count - start);
    Updates batch = {};
    int64_t widest = 1;
    for (int64_t i = 0; i < n; ++i) {
      batch.item[i] = updates[start + i];
      widest = std::max(widest, batch.item[i].channels);
    }
    const dim3 blocks(static_cast<unsigned>((widest + kThreads - 1) / kThreads), static_cast<unsigned>(n));
    update_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch, momentum);
    check_launch("update");
  }
}

}  // namespace cuda

const Primitives& cuda_primitives() {
  static const Primitives table = {true,           cuda::scratch,  cuda::norm,  cuda::norm_grad, cuda::stats,
                                   cuda::finalize, cuda::given,    cuda::apply, cuda::reduce,    cuda::input_grad,
                                   cuda::frame_sum, cuda::update,  cuda::pool,  cuda::pool_grad};
  return table;
}

}  // namespace avsf
