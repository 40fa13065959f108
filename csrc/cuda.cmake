# curvfast._cuda: included unless CURVFAST_CUDA is OFF. Where nvcc is missing, AUTO goes without.
include(CheckLanguage)
check_language(CUDA)

set(missing "")
if(NOT CMAKE_CUDA_COMPILER)
  set(missing "no working nvcc was found")
else()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
    set(missing "nvcc ${CMAKE_CUDA_COMPILER_VERSION} knows no C++20, version 12 does")
  elseif(NOT "cuda_std_20" IN_LIST CMAKE_CUDA_COMPILE_FEATURES)
    set(missing "CMake ${CMAKE_VERSION} cannot ask nvcc for C++20, version 3.26 can")
  endif()
endif()

if(missing)
  if(CURVFAST_CUDA STREQUAL "AUTO")
    message(STATUS "curvfast._cuda is not built: ${missing}")
    return()
  endif()
  message(FATAL_ERROR "CURVFAST_CUDA=${CURVFAST_CUDA}, but ${missing}. "
    "Put a newer CMake, or nvcc, on PATH (or name nvcc with CUDACXX), or pass -DCURVFAST_CUDA=AUTO.")
endif()

# Machine code for each generation; PTX of the newest serves what comes after it. Not CMake's own
# variable, which enabling the language fills with a default.
set(CURVFAST_CUDA_ARCHITECTURES "" CACHE STRING
  "Instead of every generation there is code for: 90a-real, say, or native for the card at hand")
set(architectures ${CURVFAST_CUDA_ARCHITECTURES})
if(NOT architectures)
  set(architectures 80-real 90a-real)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    list(APPEND architectures 90-virtual)
  else()
    list(APPEND architectures 100)
  endif()
endif()
message(STATUS "curvfast._cuda is built for ${architectures}")

set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
pybind11_add_module(_cuda csrc/bindings_cuda.cpp csrc/triangle.cu)
# --threads: nvcc compiles for several generations at a time.
target_compile_options(_cuda PRIVATE ${CURVFAST_OPTIONS} $<$<COMPILE_LANGUAGE:CUDA>:--threads=0>)
# A static runtime: the module imports where there is no CUDA.
set_target_properties(_cuda PROPERTIES
  CUDA_ARCHITECTURES "${architectures}" CUDA_RUNTIME_LIBRARY Static)
