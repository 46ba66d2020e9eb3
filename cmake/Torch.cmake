# Finds the installed torch by asking Python, and makes the target isthmus::torch.
#
# find_package(Torch) is avoided on purpose: with a CUDA wheel it demands a complete CUDA toolkit even for
# a CPU build, and it takes over CMAKE_CUDA_ARCHITECTURES.

execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/probe_torch.py"
  OUTPUT_VARIABLE torch_probe
  ERROR_VARIABLE torch_probe_error
  RESULT_VARIABLE torch_probe_result
  OUTPUT_STRIP_TRAILING_WHITESPACE)

if(NOT torch_probe_result EQUAL 0)
  message(FATAL_ERROR
    "Isthmus compiles against an installed torch, and ${Python_EXECUTABLE} has none. Install torch first "
    "(pip install 'torch>=2.10'), then isthmus, with --no-build-isolation if the build still cannot see it.\n"
    "${torch_probe_error}")
endif()

list(GET torch_probe 0 ISTHMUS_TORCH_VERSION)
list(GET torch_probe 1 ISTHMUS_TORCH_CUDA)
list(GET torch_probe 2 ISTHMUS_TORCH_ROOT)

if(ISTHMUS_TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "Isthmus needs torch 2.10 or later; found ${ISTHMUS_TORCH_VERSION} in ${ISTHMUS_TORCH_ROOT}.")
endif()
message(STATUS "Isthmus: torch ${ISTHMUS_TORCH_VERSION}, its CUDA: ${ISTHMUS_TORCH_CUDA}")

add_library(isthmus_torch INTERFACE)
add_library(isthmus::torch ALIAS isthmus_torch)
target_include_directories(isthmus_torch SYSTEM INTERFACE "${ISTHMUS_TORCH_ROOT}/include")
target_link_directories(isthmus_torch INTERFACE "${ISTHMUS_TORCH_ROOT}/lib")
# Only the C shim of libtorch_cpu is called; see TORCH_TARGET_VERSION in csrc/CMakeLists.txt.
target_link_libraries(isthmus_torch INTERFACE torch_cpu)
