// One flat tuple -> the structs of edge.h, in the order of their members, nested structs in place; `Rows` is
// (data, stride_b, stride_n, stride_h).
#pragma once
#include "edge.h"
#include "module_args.h"

namespace vicinal {

inline Graph read_graph(TupleReader& t) {
  Graph g;
  g.n_dst = t.integer(), g.n_src = t.integer(), g.wide = t.small();
  g.rowptr = t.pointer(), g.col = static_cast<const int32_t*>(t.pointer()), g.edge_id = t.pointer();
  g.colptr = t.pointer(), g.rev = t.pointer(), g.rev_dst = static_cast<const int32_t*>(t.pointer());
  return g;
}

inline Edge read_edge(TupleReader& t) {
  Edge a;
  a.dtype = static_cast<DType>(t.small()), a.mode = static_cast<EdgeMode>(t.small());
  a.heads = t.small(), a.dim = t.small(), a.dim_v = t.small(), a.edges = t.integer(), a.tied = t.small();
  a.scale = t.real(), a.eps = t.real(), a.clamp = t.real();
  a.graph = read_graph(t);
  a.q = t.rows(), a.k = t.rows(), a.v = t.rows();
  a.edge_k = t.rows(), a.edge_v = t.rows(), a.edge_mul = t.rows(), a.edge_gate = t.rows();
  a.bias = t.pointer();
  return a;
}

inline EdgeFwd read_edge_fwd(TupleReader& t) {
  EdgeFwd p;
  p.a = read_edge(t);
  p.out = t.rows(), p.lse = t.pointer(), p.edge = t.rows();
  return p;
}

inline EdgeBwd read_edge_bwd(TupleReader& t) {
  EdgeBwd p;
  p.a = read_edge(t);
  p.dout = t.rows(), p.dlse = t.pointer(), p.dedge = t.rows();
  p.dq = t.rows(), p.dk = t.rows(), p.dv = t.rows();
  p.dedge_k = t.rows(), p.dedge_v = t.rows(), p.dedge_mul = t.rows(), p.dedge_gate = t.rows();
  p.dbias = t.pointer(), p.weights = t.pointer();
  return p;
}

}  // namespace vicinal
