"""Multi-head attention inside torch's encoder and decoder layers, and under torch's tools: forward always
runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_support import CountOps, redraw
from multihead_support import differences, outputs_and_gradients, padding, pair, slow_path
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vicinal
from vicinal.nn import (
    LinearMultiheadAttention,
    MultiheadAttention,
    NeighborhoodMultiheadAttention,
    SegmentMultiheadAttention,
    WindowedMultiheadAttention,
)

N, L, C, H = 2, 12, 16, 4


def _encoder(norm_first: bool, layers: int = 2) -> Any:
    layer = nn.TransformerEncoderLayer(C, H, 32, 0.0, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return redraw(nn.TransformerEncoder(layer, layers))


def _left_aligned() -> Tensor:
    return torch.arange(L)[None] >= torch.tensor([[7], [L]])


MASKS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "none": dict,
    "left": lambda: {"src_key_padding_mask": _left_aligned()},
    "scattered": lambda: {"src_key_padding_mask": padding(N, L)},
    "causal": lambda: {"mask": nn.Transformer.generate_square_subsequent_mask(L)},
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masking", MASKS)
def test_encoders_never_bypass_our_forward(masking: str, norm_first: bool) -> None:
    theirs = _encoder(norm_first)
    ours = copy.deepcopy(theirs)
    report = vicinal.accelerate(ours)
    assert [row.module for row in report.replaced].count(nn.MultiheadAttention) == 2
    calls: list[Any] = []
    for layer in ours.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    x, call = torch.randn(N, L, C), MASKS[masking]()
    real = ~call.get("src_key_padding_mask", torch.zeros(N, L).bool())
    with slow_path():
        expected = theirs.eval()(x, **call)
    modes: list[Any] = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    for mode in modes:
        with mode():
            calls.clear()
            actual = ours.eval()(x, **call)
            assert len(calls) == 2, "direct hooks fire too"
            assert (actual - expected)[real].abs().max() < 2e-5
            calls.clear()
            layer = ours.layers[0](x, src_key_padding_mask=call.get("src_key_padding_mask"))
            assert len(calls) == 1
            assert layer.isfinite().all()
    ours.train()(x, **call).sum().backward()


def test_without_hooks_the_kernels_run_in_inference() -> None:
    encoder = _encoder(False).eval()
    vicinal.accelerate(encoder)
    x = torch.randn(N, L, C)
    if "the reference" in str(vicinal.explain(encoder.layers[0].self_attn, x, x, x)):
        pytest.skip("no backend but the reference")
    for masking, kernel in (("none", "windowed"), ("left", "voxel"), ("scattered", "voxel")):
        with torch.no_grad(), CountOps() as counter:
            encoder(x, **MASKS[masking]())
        assert {name.split(".")[1] for name in counter.calls} == {f"{kernel}_fwd"}
        assert sum(counter.calls.values()) == 2


def test_parameters_hide_from_the_bypass_and_from_nothing_else() -> None:
    ours, theirs = pair(C, H)
    assert not ours._qkv_same_embed_dim
    for twin in (copy.deepcopy(ours), ours):
        twin.load_state_dict(theirs.state_dict(), strict=True)
        assert not twin._qkv_same_embed_dim
    assert torch.backends.mha.get_fastpath_enabled()


def test_nested_tensors_are_switched_off_before_and_after_the_encoder_is_made() -> None:
    layer = nn.TransformerEncoderLayer(C, H, 32, 0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(C, H, batch_first=True)
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        before = nn.TransformerEncoder(layer, 1)
    assert not before.use_nested_tensor
    after = _encoder(False)
    assert after.use_nested_tensor
    vicinal.accelerate(after)
    assert not after.use_nested_tensor
    assert not copy.deepcopy(after).use_nested_tensor
    vicinal.restore(after)
    assert after.use_nested_tensor
    assert type(after) is nn.TransformerEncoder


@pytest.mark.parametrize("average", [True, False])
def test_a_nested_tensor_gives_the_padded_result(average: bool) -> None:
    ours, theirs = pair(C, H, batch_first=True)
    rows = [torch.randn(5, C), torch.randn(3, C)]
    nested = torch.nested.nested_tensor(rows)
    with torch.no_grad():
        out, weights = ours.eval()(nested, nested, nested, average_attn_weights=average)
        for x, got in zip(rows, out.unbind(), strict=True):
            assert (got - theirs(x, x, x)[0]).abs().max() < 1e-5
    assert weights.shape == ((2, 5, 5) if average else (2, H, 5, 5))
    assert not weights[1, ..., 3:, :].any()
    with pytest.raises(AssertionError, match="a mask is given with a NestedTensor"):
        ours(nested, nested, nested, padding(2, 5))
    with pytest.raises(AssertionError, match="not one NestedTensor"):
        ours(nested, nested.clone(), nested)
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(AssertionError, match="to_padded_tensor and pass key_padding_mask"):
        ours(jagged, jagged, jagged)


def test_encoder_that_still_makes_nested_tensors_is_right() -> None:
    class Own(nn.TransformerEncoder):
        pass

    layer = nn.TransformerEncoderLayer(C, H, 32, 0.0, batch_first=True)
    encoder = redraw(Own(layer, 2)).eval()
    x, hidden = torch.randn(N, L, C), _left_aligned()
    with slow_path():
        expected = encoder(x, src_key_padding_mask=hidden)
    vicinal.accelerate(encoder)
    assert encoder.use_nested_tensor
    with torch.no_grad():
        actual = encoder(x, src_key_padding_mask=hidden)
    assert (actual - expected)[~hidden].abs().max() < 2e-5


@pytest.mark.parametrize("batch_first", [False, True])
def test_decoders_with_cross_attention(batch_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(C, H, 32, 0.0, batch_first=batch_first)
    theirs = redraw(nn.TransformerDecoder(layer, 2))
    ours = copy.deepcopy(theirs)
    assert len(vicinal.accelerate(ours).replaced) == 4
    x, memory = torch.randn(N, 6, C), torch.randn(N, L, C)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    call = {"tgt_mask": causal, "memory_key_padding_mask": _left_aligned()}
    expected = theirs(x, memory, **call)
    for training in (True, False):
        assert (ours.train(training)(x, memory, **call) - expected).abs().max() < 2e-5
    with torch.no_grad():
        assert (ours(x, memory, **call) - expected).abs().max() < 2e-5


VARIANTS: dict[str, Callable[[], MultiheadAttention]] = {
    "windowed": lambda: WindowedMultiheadAttention(C, H, batch_first=True, windows=3, grid=(3, 4)),
    "neighborhood": lambda: NeighborhoodMultiheadAttention(C, H, batch_first=True, neighborhood=3),
    "linear": lambda: LinearMultiheadAttention(C, H, batch_first=True),
    "segments": lambda: SegmentMultiheadAttention(
        C, H, batch_first=True, segments=vicinal.segments.from_lengths(torch.tensor([5, 7, 4, 8]))
    ),
}
WHOLE: dict[str, Callable[[], MultiheadAttention]] = {
    "windowed": lambda: WindowedMultiheadAttention(C, H, batch_first=True, windows=-1, grid=(3, 4)),
    "neighborhood": lambda: NeighborhoodMultiheadAttention(C, H, batch_first=True, neighborhood=L),
    "segments": lambda: SegmentMultiheadAttention(
        C, H, batch_first=True, segments=vicinal.segments.from_lengths(torch.tensor([L, L]))
    ),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_a_geometry_of_everything_is_full_attention(name: str, masked: bool) -> None:
    ours = redraw(WHOLE[name]()).double()
    theirs = nn.MultiheadAttention(C, H, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(N, L, C, dtype=torch.float64)
    call = {"need_weights": False} | ({"key_padding_mask": _left_aligned()} if masked else {})
    expected = outputs_and_gradients(theirs, (x, x, x), call)
    assert not differences(outputs_and_gradients(ours, (x, x, x), call), expected, 1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_local_modules_in_the_layers_of_torch(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(C, H, 32, 0.0, batch_first=True)
    layer.self_attn = VARIANTS[name]()
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        encoder = nn.TransformerEncoder(layer, 2)
    x, calls = torch.randn(N, L, C), [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for each in encoder.layers:
        each.self_attn.register_forward_hook(count)
    expected = encoder(x)
    full = copy.deepcopy(encoder)
    for each in full.layers:
        each.self_attn.__class__ = MultiheadAttention
    assert (full(x) - expected).abs().max() > 1e-3  # the geometry matters
    calls[0] = 0
    with torch.no_grad():
        assert (encoder.eval()(x) - expected).abs().max() < 1e-5
    assert calls[0] == 2
    expected.sum().backward()
    decoder = nn.TransformerDecoderLayer(C, H, 32, 0.0, batch_first=True)
    decoder.self_attn, decoder.multihead_attn = VARIANTS[name](), VARIANTS[name]()
    assert decoder(x, x).shape == x.shape
    assert copy.deepcopy(decoder)(x, x).isfinite().all()


def test_causal_local_modules_take_the_decoders_causal_mask() -> None:
    x = torch.randn(N, L, C)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    near = vicinal.neighborhood.Neighborhood(3, is_causal=True)
    modules = (
        NeighborhoodMultiheadAttention(C, H, batch_first=True, neighborhood=near),
        LinearMultiheadAttention(C, H, batch_first=True, is_causal=True),
    )
    for module in modules:
        layer = nn.TransformerDecoderLayer(C, H, 32, 0.0, batch_first=True).eval()
        layer.self_attn = module
        out = layer(x, x, tgt_mask=causal, tgt_is_causal=True)
        changed = x.clone()
        changed[:, -1] += 1
        assert torch.allclose(layer(changed, x, tgt_mask=causal, tgt_is_causal=True)[:, :-1], out[:, :-1])
        with pytest.raises(NotImplementedError, match=r"attn_mask is given; .* only where it is causal"):
            module(x, x, x, attn_mask=causal)


@pytest.mark.parametrize("by_head", [False, True])
def test_windows_take_the_part_of_a_mask_that_is_inside_them(by_head: bool) -> None:
    module = redraw(VARIANTS["windowed"]()).double()
    shape = (N * H, L, L) if by_head else (L, L)
    mask = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(N, L, C, dtype=torch.float64)
    row, column = torch.arange(L) // 4, torch.arange(L) % 4
    window = row // 3 * 2 + column // 3
    outside = torch.where(window[:, None] == window[None], 0.0, -torch.inf)
    full = nn.MultiheadAttention(C, H, batch_first=True, dtype=torch.float64)
    full.load_state_dict(module.state_dict())
    expected = full(x, x, x, attn_mask=mask + outside, need_weights=False)[0]
    assert (module(x, x, x, attn_mask=mask)[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["windowed", "neighborhood"])
def test_added_keys_are_seen_from_every_window(name: str) -> None:
    kinds: dict[str, Any] = {
        "windowed": WindowedMultiheadAttention,
        "neighborhood": NeighborhoodMultiheadAttention,
    }
    geometry: dict[str, Any] = {"windowed": {"windows": -1}, "neighborhood": {"neighborhood": L}}
    options = {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}
    ours = redraw(kinds[name](C, H, **options, **geometry[name])).double()
    theirs = nn.MultiheadAttention(C, H, **options, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(N, L, C, dtype=torch.float64)
    expected = outputs_and_gradients(theirs, (x, x, x), {"need_weights": False})
    assert not differences(outputs_and_gradients(ours, (x, x, x), {}), expected, 1e-12)


def test_what_local_modules_refuse() -> None:
    x = torch.randn(N, L, C)
    for make in VARIANTS.values():
        with pytest.raises(NotImplementedError, match=r"need_weights is True; .* has no dense weights"):
            make()(x, x, x, need_weights=True)
        with pytest.raises(NotImplementedError, match="cannot be scripted"):
            torch.jit.script(make())
    with pytest.raises(ValueError, match="query has 12 tokens and key 12; windowed attention with grid"):
        WindowedMultiheadAttention(C, H, batch_first=True, windows=2, grid=(3, 5))(x, x, x)
    with pytest.raises(ValueError, match="grid is"):
        WindowedMultiheadAttention(C, H, windows=2, grid=(3, 0))
    with pytest.raises(ValueError, match="dropout is"):
        LinearMultiheadAttention(C, H, 0.1)
    with pytest.raises(ValueError, match="a causal module takes no added keys"):
        LinearMultiheadAttention(C, H, add_zero_attn=True, is_causal=True)
    with pytest.raises(ValueError, match="add_bias_kv or add_zero_attn is True"):
        SegmentMultiheadAttention(C, H, add_bias_kv=True)
    with pytest.raises(ValueError, match="segments is None"):
        SegmentMultiheadAttention(C, H)(x, x, x)
    with pytest.raises(TypeError, match="pass key_padding_mask by its name"):
        VARIANTS["segments"]()(x, x, x, padding(N, L))
    with pytest.raises(NotImplementedError, match="adds numbers to scores"):
        VARIANTS["neighborhood"]()(x, x, x, torch.randn(N, L))


# torch's tools


@pytest.mark.parametrize("masking", ["none", "keys", "weights", "pairs"])
def test_compiles_in_one_graph(masking: str) -> None:
    ours, _ = pair(C, H, batch_first=True)
    calls: dict[str, dict[str, Any]] = {
        "none": {"need_weights": False},
        "keys": {"key_padding_mask": padding(N, L), "need_weights": False},
        "weights": {"key_padding_mask": padding(N, L)},
        "pairs": {"attn_mask": torch.randn(L, L), "need_weights": False},
    }
    call = calls[masking]
    x = torch.randn(N, L, C)
    expected = outputs_and_gradients(ours, (x, x, x), call)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    actual = outputs_and_gradients(compiled, (x, x, x), call)
    actual = {name.replace("_orig_mod.", ""): value for name, value in actual.items()}
    assert not differences(actual, expected, 1e-5)


def test_the_weights_op_passes_opcheck() -> None:
    for average in (True, False):
        q, k = (torch.randn(2, 3, 2, 4) for _ in range(2))
        lse = torch.einsum("nihd,njhd->nihj", q, k).logsumexp(-1)
        arguments = (q, k, lse, torch.zeros(2, 3), None, None, 1.0, average, 0.0)
        torch.library.opcheck(torch.ops.vicinal.weights_fwd.torch, arguments)
        given = torch.randn(2, 3, 3) if average else torch.randn(2, 2, 3, 3)
        torch.library.opcheck(torch.ops.vicinal.weights_bwd.torch, (given, *arguments, False))


def test_scripted_traced_and_exported_it_is_torchs_own() -> None:
    ours, theirs = pair(C, H, batch_first=True)
    ours, theirs, x = ours.eval(), theirs.eval(), torch.randn(N, L, C)
    expected = theirs(x, x, x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (torch.jit.script(ours)(x, x, x)[0] - expected).abs().max() < 1e-5
        assert (torch.jit.trace(ours, (x, x, x))(x, x, x)[0] - expected).abs().max() < 1e-5
        exported = torch.export.export(ours, (x, x, x), {"need_weights": False})
    assert (exported.module()(x, x, x, need_weights=False)[0] - expected).abs().max() < 1e-5
    ops = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [op for op in ops if "vicinal" in op]
    assert any("scaled_dot_product_attention" in op for op in ops)


def test_what_our_kernels_do_not_take_runs_as_torchs_and_says_so_once() -> None:
    from vicinal import _multihead_check as check

    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs or {})

    ours, theirs = pair(C, H, batch_first=True)
    x = torch.randn(N, L, C)
    check.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="runs as torch's own: a Logged with __torch_function__"):
        out = ours(x.as_subclass(Logged), x, x)[0]
    assert (out - theirs(x, x, x)[0]).abs().max() < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x.as_subclass(Logged), x, x)
        with torch.device("cpu"):  # a mode is no reason
            ours(x, x, x)
    with pytest.warns(UserWarning, match="tensors on meta"):
        assert ours.to("meta")(*[x.to("meta")] * 3)[0].shape == x.shape


def test_checkpointing_and_functional_transforms() -> None:
    ours, theirs = pair(6, 2, batch_first=True)
    x = torch.randn(N, 4, 6)
    out = checkpoint(lambda t: ours(t, t, t)[0], x, use_reentrant=False)
    assert (out - theirs(x, x, x)[0]).abs().max() < 1e-5
    parameters = dict(theirs.named_parameters())

    def loss(module: nn.Module, values: dict[str, Tensor], t: Tensor) -> Tensor:
        return (
            torch.func.functional_call(module, values, (t, t, t), {"need_weights": False})[0].square().sum()
        )

    def grads(module: nn.Module) -> dict[str, Tensor]:
        each = torch.func.grad(lambda values, t: loss(module, values, t[None]))
        return torch.func.vmap(each, (None, 0))(parameters, x)

    with slow_path():
        expected = grads(theirs)
    assert not differences(grads(ours), expected, 1e-4)


def test_state_is_not_written_in_forward_and_isinstance_holds() -> None:
    ours, _ = pair(C, H, batch_first=True)
    before = dict(vars(ours))
    x = torch.randn(N, L, C)
    ours(x, x, x, padding(N, L))
    assert vars(ours) == before
    assert isinstance(ours, nn.MultiheadAttention)
    from torch.ao.nn.quantizable import MultiheadAttention as Quantizable

    model = nn.ModuleDict({"a": nn.MultiheadAttention(C, H)})
    vicinal.accelerate(model)
    vicinal.restore(model)
    assert type(model["a"]) is nn.MultiheadAttention
    model["a"].qconfig = None  # type: ignore[assignment]
    assert isinstance(Quantizable.from_float(model["a"]), Quantizable)
