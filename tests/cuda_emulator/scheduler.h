#pragma once

#include <cstddef>
#include <string>

#include "emulator.h"

// What the emulator's own files know of each other.

namespace cuda_emulator {

inline constexpr int kMaxThreads = 1024;
inline constexpr int kLanes = 32;

std::string environment(const char* name, const char* otherwise);

/// Of the running block.
size_t shared_bytes();

/// The running thread waits at what `name` says, until any thread calls wake().
void sleep(const char* name);
void wake();

/// Before each block; also reads HFH_EMULATOR_COPIES.
void forget_copies();

}  // namespace cuda_emulator
