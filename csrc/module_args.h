// One flat Python tuple -> the structs of attend.h. The order is that of the struct members, nested structs
// in place; a pointer is an int (0: null), `Rows` is (data, stride_b, stride_n, stride_h). Every tuple starts
// with an Attend:
//
//   dtype activation batch heads kv_heads head_dim head_dim_v n_q n_k
//   q[4] k[4] v[4]
//   plan: axes rows n_rows q_slots k_slots guard
//   scale mask_value bias bias_size q_scale k_scale scale_stride_n key_bias mask mask_count mask_stride_w
//   mask_stride_h extra_k[4] extra_v[4] n_extra edge_row dropout_p seed head_offset head_total drop_by_token
//   q_coords k_coords rel rel_size
//
//   forward, then:  out[4] lse lse_stride_n
//   backward, then: out[4] dout[4] lse dlse lse_stride_n dq[4] dk[4] dv[4] dbias dextra_k[4] dextra_v[4]
//                  key_plan[6] drel
//
// and ends with what the launcher takes besides (cpu: threads; cuda: workspace of a backward, stream).
#pragma once
#include <Python.h>

#include "attend.h"

namespace vicinal {

// Reads a tuple from front to back; after a wrong type or too few items `ok()` is false and a Python error is
// set.
class TupleReader {
 public:
  explicit TupleReader(PyObject* tuple)
      : tuple_(tuple), size_(PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : -1) {
    if (size_ < 0) PyErr_SetString(PyExc_TypeError, "expected one tuple of launch arguments");
  }

  int64_t integer() {
    PyObject* item = next();
    return item ? PyLong_AsLongLong(item) : 0;
  }
  int32_t small() { return static_cast<int32_t>(integer()); }
  double real() {
    PyObject* item = next();
    return item ? PyFloat_AsDouble(item) : 0.0;
  }
  void* pointer() {
    PyObject* item = next();
    return item ? reinterpret_cast<void*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(item))) : nullptr;
  }
  Rows rows() {
    Rows r;
    r.data = pointer(), r.stride_b = integer(), r.stride_n = integer(), r.stride_h = integer();
    return r;
  }

  // Call at the end: also checks that nothing is left over.
  bool ok() {
    if (PyErr_Occurred()) return false;
    if (at_ == size_) return true;
    PyErr_Format(PyExc_TypeError, "expected %zd launch arguments, got %zd", at_, size_);
    return false;
  }

 private:
  PyObject* next() {
    ++at_;
    return at_ <= size_ ? PyTuple_GET_ITEM(tuple_, at_ - 1) : nullptr;
  }

  PyObject* tuple_;
  Py_ssize_t size_, at_ = 0;
};

inline Plan read_plan(TupleReader& t) {
  Plan plan;
  plan.axes = static_cast<const AxisEntry*>(t.pointer());
  plan.rows = static_cast<const PlanRow*>(t.pointer());
  plan.n_rows = t.integer(), plan.q_slots = t.small(), plan.k_slots = t.small(), plan.guard = t.small();
  return plan;
}

inline Attend read_attend(TupleReader& t) {
  Attend a;
  a.dtype = static_cast<DType>(t.small()), a.activation = static_cast<Activation>(t.small());
  a.batch = t.integer(), a.heads = t.small(), a.kv_heads = t.small(), a.head_dim = t.small(),
  a.head_dim_v = t.small();
  a.n_q = t.integer(), a.n_k = t.integer();
  a.q = t.rows(), a.k = t.rows(), a.v = t.rows();
  a.plan = read_plan(t);
  a.scale = t.real(), a.mask_value = t.real();
  a.bias = t.pointer(), a.bias_size = t.integer();
  a.q_scale = t.pointer(), a.k_scale = t.pointer(), a.scale_stride_n = t.integer();
  a.key_bias = t.pointer();
  a.mask = t.pointer(), a.mask_count = t.integer(), a.mask_stride_w = t.integer(),
  a.mask_stride_h = t.integer();
  a.extra_k = t.rows(), a.extra_v = t.rows(), a.n_extra = t.small(), a.edge_row = t.small();
  a.dropout_p = t.real(), a.seed = static_cast<const int64_t*>(t.pointer());
  a.head_offset = t.small(), a.head_total = t.small(), a.drop_by_token = t.small();
  a.q_coords = static_cast<const int32_t*>(t.pointer()),
  a.k_coords = static_cast<const int32_t*>(t.pointer());
  a.rel = t.pointer(), a.rel_size = t.small();
  return a;
}

inline AttendFwd read_attend_fwd(TupleReader& t) {
  AttendFwd p;
  p.a = read_attend(t);
  p.out = t.rows();
  p.lse = t.pointer(), p.lse_stride_n = t.integer();
  return p;
}

inline AttendBwd read_attend_bwd(TupleReader& t) {
  AttendBwd p;
  p.a = read_attend(t);
  p.out = t.rows(), p.dout = t.rows();
  p.lse = t.pointer(), p.dlse = t.pointer(), p.lse_stride_n = t.integer();
  p.dq = t.rows(), p.dk = t.rows(), p.dv = t.rows();
  p.dbias = t.pointer();
  p.dextra_k = t.rows(), p.dextra_v = t.rows();
  p.key_plan = read_plan(t);
  p.drel = t.pointer();
  return p;
}

}  // namespace vicinal
