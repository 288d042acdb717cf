# Decides whether to build the CUDA kernels, with which nvcc and for which GPUs: sets TFOPS_WITH_CUDA, TFOPS_CUDA_OPTIONS
# and TFOPS_CUDA_ARCHITECTURES (as CMake writes them), and enables the language.
#
# nvcc is taken from CMAKE_CUDA_COMPILER or CUDACXX, else PATH, else from NVIDIA's packages of PyPI beside this Python
# (build_backend.py asks for them where there is no nvcc). An nvcc that is there but does not work is an error: the
# build does not silently go on without CUDA.

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

set(nvcc "${CMAKE_CUDA_COMPILER}")
if(NOT nvcc)
  separate_arguments(nvcc UNIX_COMMAND "$ENV{CUDACXX}")
endif()
if(NOT nvcc)
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
  if(NOT TFOPS_NVCC)
    if(TFOPS_CUDA STREQUAL "ON")
      message(FATAL_ERROR "TFOPS_CUDA=ON, but no nvcc was found: set CUDACXX, or put nvcc on PATH")
    endif()
    message(WARNING "\n"
      "  ************************************************************************\n"
      "  *  No nvcc was found: this build of tfops has NO CUDA KERNELS.         *\n"
      "  *  It runs on the CPU alone. For a GPU, set CUDACXX or put nvcc on     *\n"
      "  *  PATH and build again; TFOPS_CUDA=OFF silences this.                 *\n"
      "  ************************************************************************\n")
    return()
  endif()
  set(nvcc ${TFOPS_NVCC})
  set(CMAKE_CUDA_COMPILER ${TFOPS_NVCC})
endif()

# What nvcc itself says of a host compiler that it does not support is lost in CMake's own test of it.
separate_arguments(flags UNIX_COMMAND "$ENV{CUDAFLAGS} ${CMAKE_CUDA_FLAGS}")
set(probe ${CMAKE_BINARY_DIR}/CMakeFiles/probe)
file(WRITE ${probe}.cu "__global__ void Probe() {}\n")
set(host "$ENV{CUDAHOSTCXX}")
if(CMAKE_CUDA_HOST_COMPILER)
  set(host "${CMAKE_CUDA_HOST_COMPILER}")
endif()
if(host)
  set(host -ccbin ${host})
endif()
execute_process(COMMAND ${nvcc} ${flags} ${host} -c ${probe}.cu -o ${probe}.o RESULT_VARIABLE failed OUTPUT_VARIABLE said
                ERROR_VARIABLE said)
if(failed)
  list(JOIN nvcc " " nvcc)
  message(FATAL_ERROR "nvcc does not work: ${nvcc} compiles no kernel (${failed}). Name another with CUDACXX, or a host "
    "compiler that it supports with CUDAHOSTCXX, or set TFOPS_CUDA=OFF. It said: ${said}")
endif()
list(GET nvcc 0 program)

set(TFOPS_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES})
if(NOT TFOPS_CUDA_ARCHITECTURES)
  tfops_cuda_architectures(${program} ${gpus})
  if(gpus AND NOT TFOPS_CUDA_OPTIONS AND TFOPS_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA kernels: none, for this build is for this machine alone, and nvidia-smi lists no GPU of "
                   "compute capability ${TFOPS_CUDA_LEAST} or later, which ${program} compiles for")
    return()
  endif()
  if(gpus AND NOT TFOPS_CUDA_OPTIONS)
    tfops_cuda_architectures(${program})
  endif()
  if(NOT TFOPS_CUDA_OPTIONS)
    message(FATAL_ERROR "${program} --list-gpu-code lists no GPU of compute capability 7.0 or later: name nvcc 12.2 or "
                        "newer with CUDACXX, or set CMAKE_CUDA_ARCHITECTURES")
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
