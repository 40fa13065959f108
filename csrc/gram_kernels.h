// The innermost loop of a second moment, written once for each instruction set.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace curvfast {

// Packed rows lie in strips of kStrip features: in each step one word a feature, which is one
// float32 value or two of bfloat16, the first in the low half.
constexpr std::int64_t kStrip = 32, kRegisterRows = 8;

// Adds scale times the products of kRegisterRows features, whose words begin at a, with the strip
// at b, over so many steps, to out: kRegisterRows rows of kStrip values, stride apart.
using Kernel = void (*)(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps,
                        float scale, float* out, std::int64_t stride);

struct InstructionSet {
  const char* name;
  bool (*supported)();
  Kernel float32, bfloat16;
};

// Those this compiler knows, from the plainest on; the first is plain C++ and runs everywhere.
std::span<const InstructionSet> instruction_sets();

// The one of that name. Throws std::invalid_argument where there is none, or none that this
// processor supports.
const InstructionSet& instruction_set(const std::string& name);

}  // namespace curvfast
