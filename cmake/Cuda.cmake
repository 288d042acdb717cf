# Decides whether to build the CUDA kernels, with which nvcc and for which GPUs: sets TFOPS_WITH_CUDA, TFOPS_CUDA_OPTIONS
# and TFOPS_CUDA_ARCHITECTURES (as CMake writes them), and enables the language.
#
# nvcc is taken from CUDACXX, else PATH, else from NVIDIA's packages of PyPI beside this Python (build_backend.py asks
# for them where there is no nvcc).

include(CudaArchitectures)

set(TFOPS_WITH_CUDA FALSE)
set(TFOPS_CUDA_OPTIONS "")
if(NOT TFOPS_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TFOPS_CUDA must be AUTO, ON or OFF, but it is '${TFOPS_CUDA}'")
endif()
if(TFOPS_CUDA STREQUAL "OFF")
  message(STATUS "CUDA kernels: off, as asked")
  return()
endif()

# For this machine alone: its GPUs, and no CUDA where there are none.
set(gpus "")
if(TFOPS_NATIVE AND NOT CMAKE_CUDA_ARCHITECTURES)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE listed RESULT_VARIABLE failed ERROR_QUIET)
  if(NOT failed)  # else it prints what went wrong
    string(REGEX REPLACE "[ \r\n]+" ";" listed "${listed}")
    foreach(capability IN LISTS listed)
      if(capability MATCHES "^([0-9]+)\\.([0-9])$")
        list(APPEND gpus ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
      endif()
    endforeach()
    list(REMOVE_DUPLICATES gpus)
  endif()
  if(NOT gpus AND TFOPS_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA kernels: none, for this build is for this machine alone, and nvidia-smi lists no GPU")
    return()
  endif()
endif()

if(NOT DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
  find_program(TFOPS_NVCC nvcc)
  if(NOT TFOPS_NVCC)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
              "import glob, sys; print(next((n for p in sys.path for n in glob.glob(p + '/nvidia/cu13/bin/nvcc')), ''))"
      OUTPUT_VARIABLE TFOPS_NVCC OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(TFOPS_NVCC)
      # nvcc's profile looks for libraries in lib64, the packages put them in lib.
      cmake_path(GET TFOPS_NVCC PARENT_PATH cuda_bin)
      cmake_path(GET cuda_bin PARENT_PATH cuda_home)
      set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${cuda_home}/lib")
    endif()
  endif()
  if(TFOPS_NVCC)
    set(CMAKE_CUDA_COMPILER ${TFOPS_NVCC})
  endif()
endif()

include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  set(TFOPS_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES})
  if(NOT TFOPS_CUDA_ARCHITECTURES)
    tfops_cuda_architectures(${CMAKE_CUDA_COMPILER} ${gpus})
    if(gpus AND NOT TFOPS_CUDA_OPTIONS AND TFOPS_CUDA STREQUAL "AUTO")
      message(STATUS "CUDA kernels: none, for this build is for this machine alone, and nvidia-smi lists no GPU of "
                     "compute capability ${TFOPS_CUDA_LEAST} or later, which ${CMAKE_CUDA_COMPILER} compiles for")
      return()
    endif()
    if(gpus AND NOT TFOPS_CUDA_OPTIONS)
      tfops_cuda_architectures(${CMAKE_CUDA_COMPILER})
    endif()
    set(CMAKE_CUDA_ARCHITECTURES OFF)
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.2)  # the least that the tests compile against
    message(FATAL_ERROR "tfops needs nvcc 12.2 or newer, but ${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}; "
                        "set CUDACXX to another, or TFOPS_CUDA=OFF")
  endif()
  set(TFOPS_WITH_CUDA TRUE)
  message(STATUS "CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${TFOPS_CUDA_ARCHITECTURES}")
elseif(TFOPS_CUDA STREQUAL "ON")
  message(FATAL_ERROR "TFOPS_CUDA=ON, but no working nvcc was found: set CUDACXX, or put nvcc on PATH")
else()
  message(WARNING "\n"
    "  ************************************************************************\n"
    "  *  No nvcc was found: this build of tfops has NO CUDA KERNELS.         *\n"
    "  *  It runs on the CPU alone. For a GPU, set CUDACXX or put nvcc on     *\n"
    "  *  PATH and build again; TFOPS_CUDA=OFF silences this.                 *\n"
    "  ************************************************************************\n")
endif()
