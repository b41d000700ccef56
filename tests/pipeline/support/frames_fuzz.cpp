// Random sizes and windows through the fused operation, in buffers of exactly the size that it may touch.
// Arguments: seed, cases, "short" for a luma buffer that lacks its last byte, which a sanitizer has to see.
#include "frames.cpp"

#include <cstdio>
#include <random>
#include <string>
#include <vector>

int main(int count, char** words) {
  if (count < 3) return 9;
  std::mt19937 rng(std::atoi(words[1]));
  const bool cut = count > 3 && std::string(words[3]) == "short";
  const auto whole = [&rng](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  const auto real = [&rng](float low, float high) { return low + (high - low) * (rng() / 4294967296.0f); };
  std::vector<uint16_t> halves(256, 7);
  long refused = 0, made = 0;
  for (int i = 0; i < std::atoi(words[2]); ++i) {
    const int top_size = whole(0, 3) ? 40 : 1;
    const int32_t h = whole(1, top_size), w = whole(1, top_size), out_h = whole(1, 50), out_w = whole(1, 50);
    const int32_t frames = whole(0, 3), crops = whole(1, 3), channels = whole(3, 4);
    const bool half = whole(0, 1), wild = whole(0, 4) == 0;
    std::vector<float> windows;
    for (int crop = 0; crop < crops; ++crop) {
      float top = real(0, h), bottom = real(0, h), left = real(0, w), right = real(0, w);
      if (top > bottom) std::swap(top, bottom);
      if (left > right) std::swap(left, right);
      if (whole(0, 2) == 0) top = whole(0, 1) ? 0 : -0.01f, bottom = h + (whole(0, 1) ? 0 : 0.01f);
      if (whole(0, 2) == 0) left = whole(0, 1) ? 0 : -0.01f, right = w + (whole(0, 1) ? 0 : 0.01f);
      if (wild) {
        const float values[] = {NAN, INFINITY, -INFINITY, -1.0f, 1e30f, 0.0f, 41.0f};
        (&top)[0] = values[whole(0, 6)], right = values[whole(0, 6)];
      }
      windows.insert(windows.end(), {top, left, bottom, right});
    }
    // The last row ends where its last sample does.
    const int32_t half_h = (h + 1) / 2, half_w = (w + 1) / 2, pad = whole(0, 5);
    const int64_t luma_row = w + pad, chroma_row = 2 * half_w + pad;
    const int64_t luma_frame = luma_row * h + pad, chroma_frame = chroma_row * half_h + pad;
    const auto bytes = [](int64_t n, int64_t frame, int64_t rows, int64_t row, int64_t last) {
      return n == 0 ? 0 : (n - 1) * frame + (rows - 1) * row + last;
    };
    int64_t luma_bytes = bytes(frames, luma_frame, h, luma_row, w);
    if (cut) luma_bytes -= luma_bytes > 0;
    std::vector<uint8_t> luma(luma_bytes, 200), chroma(bytes(frames, chroma_frame, half_h, chroma_row, 2 * half_w), 90);
    std::vector<uint8_t> out(int64_t{crops} * frames * out_h * out_w * channels * (half ? 2 : 4));
    avsf_frames_job job{luma.data(), chroma.data(), luma_frame, luma_row, chroma_frame, chroma_row, frames, h, w,
                        crops, out_h, out_w, windows.data(), whole(0, 1), channels, whole(-1, best_level()),
                        114.75f, 1 / 57.375f, half ? halves.data() : nullptr, out.data()};
    const int32_t code = avsf_frames(&job);
    if (code != 0 && code != 2) return 8;
    ++(code ? refused : made);
  }
  std::printf("%ld made, %ld refused\n", made, refused);
  return 0;
}
