// One flat Python tuple -> the structs of hash.h, in the order of their members; `Rows` is (data, stride_b,
// stride_n, stride_h). After them comes what the launcher takes besides (cpu: threads).
#pragma once
#include "hash.h"
#include "module_args.h"

namespace vicinal {

inline Hash read_hash(TupleReader& t) {
  Hash a;
  a.dtype = static_cast<DType>(t.small()), a.batch = t.integer(), a.n = t.integer();
  a.heads = t.small(), a.dim = t.small(), a.dim_v = t.small(), a.anchors = t.small(), a.bits = t.small();
  a.self = t.small(), a.offset = t.real();
  a.qk = t.rows(), a.v = t.rows();
  a.anchor = t.pointer(), a.weight = t.pointer(), a.mean = t.pointer();
  return a;
}

inline HashFwd read_hash_fwd(TupleReader& t) {
  HashFwd p;
  p.a = read_hash(t);
  p.out = t.rows(), p.codes = static_cast<int32_t*>(t.pointer()), p.state = t.pointer();
  return p;
}

inline HashBwd read_hash_bwd(TupleReader& t) {
  HashBwd p;
  p.a = read_hash(t);
  p.dout = t.rows(), p.dqk = t.rows(), p.dv = t.rows();
  p.codes = static_cast<const int32_t*>(t.pointer()), p.state = t.pointer();
  return p;
}

}  // namespace vicinal
