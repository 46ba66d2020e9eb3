# CUDA is built when nvcc exists and the installed torch has CUDA of the same major version; otherwise the build is
# CPU-only, which is no reason for a warning. ISTHMUS_CUDA_STATUS tells which, and why; build_info() repeats it.

option(ISTHMUS_CUDA_CHECK "Compile the CUDA sources whatever torch is installed; for `make cuda-check`" OFF)

include(CheckLanguage)
set(ISTHMUS_CUDA OFF)

if(ISTHMUS_TORCH_CUDA STREQUAL "none" AND NOT ISTHMUS_CUDA_CHECK)
  set(ISTHMUS_CUDA_STATUS "not built: torch ${ISTHMUS_TORCH_VERSION} has no CUDA")
else()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(ISTHMUS_CUDA_STATUS "not built: no nvcc found")
  else()
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
    endif()
    enable_language(CUDA)
    string(REGEX MATCH "^[0-9]+" nvcc_major "${CMAKE_CUDA_COMPILER_VERSION}")
    string(REGEX MATCH "^[0-9]+" torch_cuda_major "${ISTHMUS_TORCH_CUDA}")
    if(NOT nvcc_major EQUAL torch_cuda_major AND NOT ISTHMUS_CUDA_CHECK)
      set(ISTHMUS_CUDA_STATUS
          "not built: nvcc is ${CMAKE_CUDA_COMPILER_VERSION}, torch was built with CUDA ${ISTHMUS_TORCH_CUDA}")
    else()
      set(ISTHMUS_CUDA ON)
      string(JOIN ", " architectures ${CMAKE_CUDA_ARCHITECTURES})  # a macro's value must hold no semicolon
      set(ISTHMUS_CUDA_STATUS "built with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${architectures}")
    endif()
  endif()
endif()
message(STATUS "Isthmus: CUDA ${ISTHMUS_CUDA_STATUS}")
