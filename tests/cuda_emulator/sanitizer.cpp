#include <cstdint>
#include <string>

#include "emulator.h"

// What the kernels' compiler calls, with -fsanitize=alignment,bounds, where an address has not the
// alignment of its type, which a GPU refuses, or an index is outside its array. The names and
// structures are the compiler's.

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void fail_at(const SourceLocation& location, const char* what) {
  cuda_emulator::fail(std::string(location.file) + ":" + std::to_string(location.line) + ": " +
                      what);
}

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1(const SourceLocation* location, uintptr_t) {
  fail_at(*location, "misaligned address");
}

void __ubsan_handle_out_of_bounds(const SourceLocation* location, uintptr_t) {
  fail_at(*location, "index outside its array");
}
}
