// How operations are registered: a frame around each that lets errors out safely.
#pragma once
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace avsf {

// What the dispatcher calls: the boxed operation. An error leaves through one frame that owns its text only: it is caught here,
// after every tensor and guard of the operation was destroyed, and thrown again as the std::runtime_error that torch's
// stable interface expects of a kernel (it offers no error code). Whatever else is thrown becomes one too.
template <class Function, Function* function>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t results) {
  std::string message;
  try {
    torch::stable::detail::boxer<Function, function>::boxed_fn(stack, arguments, results);
    return;
  } catch (const std::exception& error) {
    message = error.what();
  } catch (...) {
    message = "avsf: an unknown error";
  }
  throw std::runtime_error(message);
}
#define AVSF_BOX(...) &avsf::boxed<std::remove_pointer_t<decltype(&__VA_ARGS__)>, &__VA_ARGS__>

}  // namespace avsf
