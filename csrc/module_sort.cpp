// Bindings of the voxel keys and their sort, on raw pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/sort.h"

namespace py = pybind11;

namespace vicinal {
namespace {

template <class T>
T* at(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

int64_t pack_keys(uintptr_t coords, int coord_bytes, int64_t n, int64_t stride,
                  const std::vector<int64_t>& columns, const std::vector<int64_t>& sizes, uintptr_t tables,
                  uintptr_t keys, int key_bytes, int threads) {
  py::gil_scoped_release release;
  return cpu::pack_keys(at<void>(coords), coord_bytes, n, stride, static_cast<int>(columns.size()),
                        columns.data(), sizes.data(), at<int64_t>(tables), at<void>(keys), key_bytes,
                        threads);
}

void sort_keys(uintptr_t keys, int key_bytes, int64_t n, int bits, uintptr_t order, uintptr_t sorted,
               int threads) {
  py::gil_scoped_release release;
  cpu::sort_keys(at<void>(keys), key_bytes, n, bits, at<int32_t>(order), at<void>(sorted), threads);
}

void hilbert_codes(uintptr_t x, uintptr_t y, uintptr_t z, uintptr_t codes, int64_t n, int depth,
                   int threads) {
  py::gil_scoped_release release;
  cpu::hilbert_codes(at<int32_t>(x), at<int32_t>(y), at<int32_t>(z), at<int64_t>(codes), n, depth, threads);
}

py::tuple run_starts(uintptr_t sorted, int key_bytes, int64_t n, int shift, uintptr_t to) {
  const cpu::Runs found = cpu::run_starts(at<void>(sorted), key_bytes, n, shift, at<int32_t>(to));
  return py::make_tuple(found.count, found.equal);
}

}  // namespace

void bind_sort(py::module_& m) {
  m.def("pack_keys", &pack_keys,
        "pack_keys(coords, coord_bytes, n, stride, columns, sizes, tables, keys, "
        "key_bytes, threads): csrc/cpu/sort.h");
  m.def("sort_keys", &sort_keys, "sort_keys(keys, key_bytes, n, bits, order, sorted, threads): likewise");
  m.def("hilbert_codes", &hilbert_codes, "hilbert_codes(x, y, z, codes, n, depth, threads): likewise");
  m.def("run_starts", &run_starts, "run_starts(sorted, key_bytes, n, shift, to) -> (runs, equal): likewise");
}

}  // namespace vicinal
