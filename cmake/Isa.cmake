# One kernel body, csrc/<family>/cpu.inl, is compiled once for each instruction set by csrc/<family>/cpu_<level>.cpp.
# Only those files get -m flags. Nothing else may include SIMD code: a weak symbol compiled with AVX-512 would be
# merged by the linker into code that runs on older CPUs.

set(ISTHMUS_ISA_FLAGS_baseline "")
set(ISTHMUS_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(ISTHMUS_ISA_FLAGS_avx512
    -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(ISTHMUS_ISA_LEVELS baseline avx2 avx512)
else()
  set(ISTHMUS_ISA_LEVELS baseline)
endif()

# -O2 at the least even in Debug (an unoptimised build emits weak copies of inline functions), never LTO, and
# contraction on: the vector types of core/simd.h rely on the compiler to form fused multiply-adds.
set(ISTHMUS_KERNEL_FLAGS -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fno-lto -Wno-psabi
    # GCC 12 warns of its own headers (bug 105593).
    -Wno-uninitialized -Wno-maybe-uninitialized)

function(isthmus_add_kernels target)
  foreach(family IN LISTS ARGN)
    foreach(level IN LISTS ISTHMUS_ISA_LEVELS)
      set(source "${PROJECT_SOURCE_DIR}/csrc/${family}/cpu_${level}.cpp")
      set_source_files_properties(
        "${source}" TARGET_DIRECTORY ${target}
        PROPERTIES COMPILE_OPTIONS "${ISTHMUS_KERNEL_FLAGS};${ISTHMUS_ISA_FLAGS_${level}}")
      target_sources(${target} PRIVATE "${source}")
    endforeach()
  endforeach()
endfunction()
