// Which instruction set the kernels use: detected once, overridden by ISTHMUS_ISA or set_isa().
#pragma once

#include <string>
#include <vector>

namespace isthmus {

enum class Isa : int { baseline, avx2, avx512, avx512_bf16, amx };

const char* isa_name(Isa isa);
// Throws std::invalid_argument that lists the known names.
Isa parse_isa(const std::string& name);

// Compiled into this binary and supported by this CPU and operating system, lowest first.
std::vector<Isa> available_isas();

Isa current_isa();
// Throws std::invalid_argument if the level is not available.
void set_isa(Isa isa);
// Back to ISTHMUS_ISA if set, else to the best available level.
void reset_isa();

// One family's kernels: a table of function pointers for each level. A level without code of its own shares the table
// of the level below: most families have nothing to gain from products of bfloat16.
template <class Kernels>
struct IsaTables {
  const Kernels& baseline;
  const Kernels& avx2;
  const Kernels& avx512;
  const Kernels& avx512_bf16;
  const Kernels& amx;

  const Kernels& current() const {
    switch (current_isa()) {
      case Isa::amx:
        return amx;
      case Isa::avx512_bf16:
        return avx512_bf16;
      case Isa::avx512:
        return avx512;
      case Isa::avx2:
        return avx2;
      default:
        return baseline;
    }
  }
};

}  // namespace isthmus

// In kernels.h: ISTHMUS_DECLARE_KERNELS declares <family>_kernels(), the table of the level in use;
// ISTHMUS_DECLARE_BF16_KERNELS does for a family with code for avx512_bf16, ISTHMUS_DECLARE_MATRIX_KERNELS for one with
// code for amx as well. csrc/<family>/cpu_<level>.cpp defines the tables by compiling cpu.inl with ISTHMUS_LEVEL set.
#define ISTHMUS_DECLARE_TABLE(Kernels, family, level) \
  namespace level {                                   \
  extern const Kernels family##_table;                \
  }
#if defined(__x86_64__)
#define ISTHMUS_DECLARE_LEVELS(Kernels, family, bf16_level, amx_level)                                \
  ISTHMUS_DECLARE_TABLE(Kernels, family, baseline)                                                    \
  ISTHMUS_DECLARE_TABLE(Kernels, family, avx2)                                                        \
  ISTHMUS_DECLARE_TABLE(Kernels, family, avx512)                                                      \
  ISTHMUS_DECLARE_TABLE(Kernels, family, bf16_level)                                                  \
  ISTHMUS_DECLARE_TABLE(Kernels, family, amx_level)                                                   \
  inline const Kernels& family##_kernels() {                                                          \
    return IsaTables<Kernels>{baseline::family##_table, avx2::family##_table, avx512::family##_table, \
                              bf16_level::family##_table, amx_level::family##_table}                  \
        .current();                                                                                   \
  }
#define ISTHMUS_DECLARE_KERNELS(Kernels, family) ISTHMUS_DECLARE_LEVELS(Kernels, family, avx512, avx512)
#define ISTHMUS_DECLARE_BF16_KERNELS(Kernels, family) ISTHMUS_DECLARE_LEVELS(Kernels, family, avx512_bf16, avx512_bf16)
#define ISTHMUS_DECLARE_MATRIX_KERNELS(Kernels, family) ISTHMUS_DECLARE_LEVELS(Kernels, family, avx512_bf16, amx)
#else
#define ISTHMUS_DECLARE_KERNELS(Kernels, family)   \
  ISTHMUS_DECLARE_TABLE(Kernels, family, baseline) \
  inline const Kernels& family##_kernels() { return baseline::family##_table; }
#define ISTHMUS_DECLARE_BF16_KERNELS ISTHMUS_DECLARE_KERNELS
#define ISTHMUS_DECLARE_MATRIX_KERNELS ISTHMUS_DECLARE_KERNELS
#endif
