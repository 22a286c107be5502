# sparseprune_find_cuda(): enables CUDA where it is wanted and a toolkit works here, else says in one line why it is left out.
#
# AUTO builds for the cards of this machine and for no others: all architectures take many minutes on two cores, which
# nobody asked for. ON builds for every architecture, as wheels are; CMAKE_CUDA_ARCHITECTURES names them in either.
# Sets SPARSEPRUNE_HAS_CUDA, and with it SPARSEPRUNE_CUDA_TOOLKIT (version) and SPARSEPRUNE_CUDA_TARGETS (for people).
#
# nvcc is looked for in SPARSEPRUNE_CUDA_ROOT, CMAKE_CUDA_COMPILER, CUDACXX, among NVIDIA's packages from PyPI in the
# building Python's environment (cmake/nvcc-requirements.txt), in CUDA_HOME and CUDA_PATH, on the PATH, in /usr/local/cuda.
set(SPARSEPRUNE_CUDA AUTO CACHE STRING "CUDA kernels: AUTO (for this machine's cards, where nvcc works), ON (for every card; an error where nvcc does not work), OFF")
set_property(CACHE SPARSEPRUNE_CUDA PROPERTY STRINGS AUTO ON OFF)
set(SPARSEPRUNE_CUDA_ROOT "" CACHE PATH "The folder that holds bin/nvcc; empty: it is looked for")

# 80 A100; 86 RTX 30; 89 RTX 40, L4; 90a H100 (the suffix lets wgmma in, and binds the code to this chip); 100 B200; 120 RTX 50.
# The PTX is of the least of the newest: a chip takes PTX of its own number or lower, and 11.0 lies between 10.0 and 12.0.
set(SPARSEPRUNE_CUDA_CHIPS 80 86 89 90a 100 120)
set(SPARSEPRUNE_CUDA_PTX 100 90)

function(sparseprune_locate_nvcc out)
  set(hints)
  if(SPARSEPRUNE_CUDA_ROOT)
    find_program(nvcc nvcc PATHS "${SPARSEPRUNE_CUDA_ROOT}/bin" NO_DEFAULT_PATH NO_CACHE)
    if(NOT nvcc)
      message(FATAL_ERROR "SPARSEPRUNE_CUDA_ROOT: must hold bin/nvcc, got '${SPARSEPRUNE_CUDA_ROOT}'")
    endif()
  elseif(CMAKE_CUDA_COMPILER)
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  elseif(DEFINED ENV{CUDACXX})
    set(nvcc "$ENV{CUDACXX}")
  else()
    # Under build isolation sys.path is pip's; sysconfig still names the environment that the build was started from.
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "
import glob, sys, sysconfig
paths = [*sys.path, sysconfig.get_path('purelib'), sysconfig.get_path('platlib')]
print(';'.join(f for p in dict.fromkeys(paths) for f in sorted(glob.glob(p + '/nvidia/cu*/bin'), reverse=True)))"
      OUTPUT_VARIABLE packages OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    find_program(nvcc nvcc PATHS ${packages} NO_DEFAULT_PATH NO_CACHE)
    find_program(nvcc nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_DEFAULT_PATH NO_CACHE)
    find_program(nvcc nvcc PATHS /usr/local/cuda/bin NO_CACHE)
  endif()
  if(NOT nvcc)
    set(nvcc "")
  endif()
  set(${out} "${nvcc}" PARENT_SCOPE)
endfunction()

# Compiles and links a kernel: an unfit host compiler, a missing runtime library or header all show here, in AUTO without
# an error that ends the configuration.
function(sparseprune_try_nvcc nvcc flags out_error)
  set(folder "${CMAKE_BINARY_DIR}/CMakeFiles/sparseprune-nvcc")
  file(WRITE "${folder}/probe.cu"
    "#include <cuda_runtime.h>\n__global__ void probe(float* p) { p[threadIdx.x] = 1; }\n"
    "int run(float* p) { probe<<<1, 1>>>(p); return cudaGetLastError(); }\n")
  execute_process(
    COMMAND "${nvcc}" ${flags} -ccbin "${CMAKE_CXX_COMPILER}" -Xcompiler=-fPIC -shared -o "${folder}/probe.so" "${folder}/probe.cu"
    RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(code EQUAL 0)
    set(${out_error} "" PARENT_SCOPE)
  else()
    set(${out_error} "${output}" PARENT_SCOPE)
  endif()
endfunction()

# The compute capabilities of this machine's cards as CMake takes them ("90-real"), empty where there is none.
function(sparseprune_find_cards out)
  find_program(smi nvidia-smi NO_CACHE)
  set(cards)
  if(smi)
    execute_process(COMMAND "${smi}" --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE found ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+[.][0-9]+" cards "${found}")
    list(TRANSFORM cards REPLACE "[.]" "")
    list(TRANSFORM cards APPEND "-real")
    list(REMOVE_DUPLICATES cards)
  endif()
  set(${out} "${cards}" PARENT_SCOPE)
endfunction()

macro(sparseprune_find_cuda)
  set(SPARSEPRUNE_HAS_CUDA OFF)
  string(TOUPPER "${SPARSEPRUNE_CUDA}" _cuda_wish)
  if(_cuda_wish STREQUAL "AUTO" OR _cuda_wish)
    sparseprune_locate_nvcc(_nvcc)
    if(_cuda_wish STREQUAL "AUTO" AND NOT CMAKE_CUDA_ARCHITECTURES)
      sparseprune_find_cards(CMAKE_CUDA_ARCHITECTURES)
    endif()
    if(_cuda_wish STREQUAL "AUTO" AND NOT CMAKE_CUDA_ARCHITECTURES)
      set(_cuda_missing "this machine has no NVIDIA card")
    elseif(_nvcc)
      # NVIDIA's packages have lib where nvcc and CMake look for lib64.
      cmake_path(GET _nvcc PARENT_PATH _nvcc_bin)
      cmake_path(GET _nvcc_bin PARENT_PATH _cuda_root)
      set(_nvcc_flags)
      if(EXISTS "${_cuda_root}/lib/libcudart_static.a" AND NOT EXISTS "${_cuda_root}/lib64")
        set(_nvcc_flags "-L${_cuda_root}/lib")
      endif()
      sparseprune_try_nvcc("${_nvcc}" "${_nvcc_flags}" _cuda_missing)
    else()
      set(_cuda_missing "no nvcc was found")
    endif()
    if(_cuda_missing STREQUAL "")
      sparseprune_enable_cuda()
    elseif(_cuda_wish STREQUAL "AUTO")
      string(REGEX REPLACE "\n.*" "" _cuda_missing "${_cuda_missing}")
      message(STATUS "sparseprune: CUDA left out, the build is for CPUs: ${_nvcc} ${_cuda_missing} (SPARSEPRUNE_CUDA=ON builds for every card, or shows all that is wrong)")
    else()
      message(FATAL_ERROR "SPARSEPRUNE_CUDA=${SPARSEPRUNE_CUDA}: no CUDA toolkit works here. ${_nvcc} ${_cuda_missing}\n"
        "Install one, or pip install -r cmake/nvcc-requirements.txt into this Python, or name it by "
        "-DSPARSEPRUNE_CUDA_ROOT=<folder that holds bin/nvcc>, or build for CPUs with -DSPARSEPRUNE_CUDA=OFF.")
    endif()
  else()
    message(STATUS "sparseprune: CUDA left out, the build is for CPUs: SPARSEPRUNE_CUDA=${SPARSEPRUNE_CUDA}")
  endif()
endmacro()

# A macro: languages are enabled in the file's own scope.
macro(sparseprune_enable_cuda)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    execute_process(COMMAND "${_nvcc}" --list-gpu-code OUTPUT_VARIABLE _chips COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "sm_[0-9]+" _chips "${_chips}")  # it lists no suffixes
    set(CMAKE_CUDA_ARCHITECTURES)
    foreach(_chip IN LISTS SPARSEPRUNE_CUDA_CHIPS)
      string(REGEX MATCH "[0-9]+" _number "${_chip}")
      if("sm_${_number}" IN_LIST _chips)
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${_chip}-real)
      endif()
    endforeach()
    foreach(_chip IN LISTS SPARSEPRUNE_CUDA_PTX)
      if("sm_${_chip}" IN_LIST _chips)
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${_chip}-virtual)
        break()
      endif()
    endforeach()
  endif()
  set(CMAKE_CUDA_COMPILER "${_nvcc}")
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  string(APPEND CMAKE_CUDA_FLAGS " ${_nvcc_flags}")
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(SPARSEPRUNE_HAS_CUDA ON)
  set(SPARSEPRUNE_CUDA_TOOLKIT "${CMAKE_CUDA_COMPILER_VERSION}")
  string(REPLACE native "${CMAKE_CUDA_ARCHITECTURES_NATIVE}" SPARSEPRUNE_CUDA_TARGETS "${CMAKE_CUDA_ARCHITECTURES}")
  list(TRANSFORM SPARSEPRUNE_CUDA_TARGETS REPLACE "^([0-9]+[a-z]*)-real$" "sm_\\1")
  list(TRANSFORM SPARSEPRUNE_CUDA_TARGETS REPLACE "^([0-9]+[a-z]*)-virtual$" "compute_\\1")
  list(TRANSFORM SPARSEPRUNE_CUDA_TARGETS REPLACE "^([0-9]+[a-z]*)$" "sm_\\1 compute_\\1")
  list(JOIN SPARSEPRUNE_CUDA_TARGETS " " SPARSEPRUNE_CUDA_TARGETS)
  message(STATUS "sparseprune: CUDA ${SPARSEPRUNE_CUDA_TOOLKIT} (${_nvcc}), for ${SPARSEPRUNE_CUDA_TARGETS}")
endmacro()
