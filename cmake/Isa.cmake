# One kernel body, csrc/<family>/cpu.inl, is compiled once for each instruction set by csrc/<family>/cpu_<level>.cpp.
# Only those files get -m flags. Nothing else may include SIMD code: a weak symbol compiled with AVX-512 would be
# merged by the linker into code that runs on older CPUs.

set(ISTHMUS_ISA_FLAGS_baseline "")
set(ISTHMUS_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(ISTHMUS_ISA_FLAGS_avx512
    -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512)

# Only families that have such a file: the others share the table of avx512 (core/isa.h).
set(ISTHMUS_ISA_FLAGS_avx512_bf16 ${ISTHMUS_ISA_FLAGS_avx512} -mavx512bf16 -mavx512vnni)
set(ISTHMUS_ISA_FLAGS_amx ${ISTHMUS_ISA_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(ISTHMUS_ISA_LEVELS baseline avx2 avx512)
  set(ISTHMUS_MATRIX_LEVELS avx512_bf16 amx)
else()
  set(ISTHMUS_ISA_LEVELS baseline)
  set(ISTHMUS_MATRIX_LEVELS)
endif()

# -O2 at the least even in Debug (an unoptimised build emits weak copies of inline functions), never LTO, and
# contraction on: the vector types of core/simd.h rely on the compiler to form fused multiply-adds.
set(ISTHMUS_KERNEL_FLAGS -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fno-lto -Wno-psabi
    # GCC 12 warns of its own headers (bug 105593).
    -Wno-uninitialized -Wno-maybe-uninitialized)

function(isthmus_add_kernels target)
  foreach(family IN LISTS ARGN)
    # A level that is added to a family is found without configuring anew by hand.
    file(GLOB present CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/${family}/cpu_*.cpp")
    foreach(level IN LISTS ISTHMUS_ISA_LEVELS ISTHMUS_MATRIX_LEVELS)
      set(source "${PROJECT_SOURCE_DIR}/csrc/${family}/cpu_${level}.cpp")
      if(level IN_LIST ISTHMUS_MATRIX_LEVELS AND NOT source IN_LIST present)
        continue()
      endif()
      set_source_files_properties(
        "${source}" TARGET_DIRECTORY ${target}
        PROPERTIES COMPILE_OPTIONS "${ISTHMUS_KERNEL_FLAGS};${ISTHMUS_ISA_FLAGS_${level}}")
      target_sources(${target} PRIVATE "${source}")
    endforeach()
  endforeach()
endfunction()
