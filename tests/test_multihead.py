"""The contract of nn.MultiheadAttention, point by point: construction, calls, weights, masks, hidden rows."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from models_support import CountOps
from multihead_support import differences, outputs_and_gradients, padding, pair, slow_path
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vicinal
from vicinal.nn import MultiheadAttention


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape)


# construction


def test_constructor_arguments_are_torchs_and_bad_ones_raise_as_there() -> None:
    by_position = MultiheadAttention(8, 2, 0.1, True, True, True, 6, 4, True, "cpu", torch.float64)
    assert (by_position.kdim, by_position.vdim, by_position.batch_first) == (6, 4, True)
    assert by_position.q_proj_weight.dtype == torch.float64
    for sizes in ((0, 2), (8, 0), (-8, 2)):
        with pytest.raises(ValueError, match="greater than 0"):
            MultiheadAttention(*sizes)
    with pytest.raises(AssertionError, match="divisible"):
        MultiheadAttention(9, 2)
    with pytest.raises(ValueError, match="weights is 'always'; it must be one of 'on_request', 'never'"):
        MultiheadAttention(8, 2, weights="always")


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False, "add_bias_kv": True},
    {"kdim": 6, "vdim": 4},
    {"kdim": 8},
    {"add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parameters_are_drawn_as_torch_draws_them_and_named_as_there(options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    ours = MultiheadAttention(8, 2, **options)
    after = torch.randn(1)
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(8, 2, **options)
    assert torch.equal(after, torch.randn(1))
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in state.items())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(state, strict=True)
    torch.manual_seed(6)
    ours._reset_parameters()
    torch.manual_seed(6)
    theirs._reset_parameters()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_attributes_are_torchs() -> None:
    ours, theirs = MultiheadAttention(8, 2, 0.1), nn.MultiheadAttention(8, 2, 0.1)
    assert ours.__constants__ == theirs.__constants__
    for name in set(vars(theirs)) - {"_parameters", "_modules"}:
        assert vars(ours)[name] == vars(theirs)[name], name
    assert type(ours.out_proj) is type(theirs.out_proj)
    assert ours.merge_masks(None, None, _x(1, 2, 8)) == (None, None)
    old = dict(theirs.__dict__)
    del old["_qkv_same_embed_dim"]
    restored = MultiheadAttention.__new__(MultiheadAttention)
    restored.__setstate__(old)
    assert torch.equal(restored(*[_x(2, 1, 8)] * 3)[0].isfinite().all(), torch.tensor(True))


def test_without_bias_neither_projection_has_one() -> None:
    state = MultiheadAttention(8, 2, bias=False, add_bias_kv=True).state_dict()
    assert list(state) == ["in_proj_weight", "bias_k", "bias_v", "out_proj.weight"]
    assert state["bias_k"].shape == state["bias_v"].shape == (1, 1, 8)


def test_copies_pickles_and_changes_of_class() -> None:
    ours, theirs = pair(8, 2)
    x = _x(3, 2, 8)
    expected = ours(x, x, x)[0]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved):
        assert type(twin) is MultiheadAttention
        assert torch.equal(twin(x, x, x)[0], expected)
    assert not list(ours.buffers())
    theirs.__class__ = MultiheadAttention
    assert torch.equal(theirs(x, x, x)[0], expected)
    assert not getattr(theirs, "_qkv_same_embed_dim")  # noqa: B009
    theirs.__class__ = nn.MultiheadAttention
    assert getattr(theirs, "_qkv_same_embed_dim")  # noqa: B009
    assert not differences({"out": theirs(x, x, x)[0]}, {"out": expected}, 1e-5)


def test_the_scale_is_that_of_the_head_also_with_other_widths() -> None:
    ours, theirs = pair(8, 2, kdim=18, vdim=6, dtype=torch.float64)
    given = (_x(3, 2, 8).double(), _x(4, 2, 18).double(), _x(4, 2, 6).double())
    assert (ours(*given)[0] - theirs(*given)[0]).abs().max() < 1e-12


# calls


def test_all_arguments_by_position() -> None:
    ours, theirs = pair(8, 2, batch_first=True)
    x, hidden, causal = _x(2, 4, 8), padding(2, 4), torch.ones(4, 4).triu(1).bool()
    given = (x, x, x, hidden, True, causal, False, True)
    for a, b in zip(ours(*given), theirs(*given), strict=True):
        assert (a - b).abs().max() < 1e-5
    assert ours(x, x, x, hidden)[0].shape == x.shape


@pytest.mark.parametrize("batch_first", [False, True])
def test_two_dimensions_are_one_sample(batch_first: bool) -> None:
    ours, theirs = pair(8, 2, batch_first=batch_first)
    x, y = _x(4, 8), _x(6, 8)
    for mask in (torch.zeros(4, 6).bool(), torch.randn(2, 4, 6)):
        kpm = torch.zeros(6, dtype=mask.dtype)
        kpm[3] = 1
        for average in (True, False):
            ours_got = ours(x, y, y, kpm, attn_mask=mask, average_attn_weights=average)
            theirs_got = theirs(x, y, y, kpm, attn_mask=mask, average_attn_weights=average)
            for a, b in zip(ours_got, theirs_got, strict=True):
                assert a.shape == b.shape
                assert (a - b).abs().max() < 1e-5


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (AssertionError, "key_padding_mask is torch.int32", {"key_padding_mask": torch.zeros(2, 4).int()}),
    (AssertionError, "attn_mask is torch.uint8", {"attn_mask": torch.zeros(4, 4, dtype=torch.uint8)}),
    (RuntimeError, r"attn_mask has shape \[1, 4, 4\]", {"attn_mask": torch.zeros(1, 4, 4)}),
    (RuntimeError, r"attn_mask has shape \[4, 5\]", {"attn_mask": torch.zeros(4, 5)}),
    (AssertionError, "attn_mask has 4 dimensions", {"attn_mask": torch.zeros(2, 2, 4, 4)}),
    (AssertionError, r"key_padding_mask has shape \[2, 5\]", {"key_padding_mask": torch.zeros(2, 5)}),
    (RuntimeError, "is_causal is True and attn_mask is None", {"is_causal": True}),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[b[1] for b in BAD])
def test_bad_masks_raise_torchs_exceptions(error: type[Exception], message: str, call: Any) -> None:
    ours, theirs = pair(8, 2, batch_first=True)
    x = _x(2, 4, 8)
    with pytest.raises(error, match=message):
        ours(x, x, x, **call)
    with slow_path(), pytest.raises((AssertionError, RuntimeError)):
        theirs(x, x, x, **call)


def test_bad_tensors_raise_torchs_exceptions() -> None:
    ours, theirs = pair(8, 2, batch_first=True)
    x = _x(2, 4, 8)
    cases: list[tuple[tuple[Tensor, ...], str]] = [
        ((_x(2, 4, 9), x, x), "query has 9 channels; it must have 8"),
        ((x, _x(2, 5, 8), x), "must agree"),
        ((x, x[0], x), "key has 2 dimensions"),
        ((_x(1, 2, 4, 8), x, x), "query has 4 dimensions"),
    ]
    for given, message in cases:
        with pytest.raises(AssertionError, match=message):
            ours(*given)
        with pytest.raises((AssertionError, RuntimeError)):
            theirs(*given)


def test_masks_of_two_types_warn_and_are_both_applied() -> None:
    ours, theirs = pair(8, 2, batch_first=True)
    x, hidden, added = _x(2, 4, 8), padding(2, 4), torch.randn(4, 4)
    with pytest.warns(UserWarning, match="key_padding_mask is torch.bool and attn_mask is torch.float32"):
        actual = ours(x, x, x, hidden, attn_mask=added)[0]
    with pytest.warns(UserWarning, match="mismatched"):
        expected = theirs(x, x, x, hidden, attn_mask=added)[0]
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("float_mask", [False, True])
def test_padding_as_bool_and_as_floats_runs_over_the_keys_there_are(float_mask: bool) -> None:
    ours, _ = pair(8, 2, batch_first=True)
    x, hidden = _x(2, 16, 8), padding(2, 16)
    mask = torch.zeros(2, 16).masked_fill(hidden, -torch.inf) if float_mask else hidden
    explanation = vicinal.explain(ours, x, x, x, mask, need_weights=False)
    if "the reference" in str(explanation):
        pytest.skip(str(explanation))
    assert explanation.backend == "segments"
    with CountOps() as counter:
        ours(x, x, x, mask, need_weights=False)
    assert [name.split(".")[1] for name in counter.calls] == ["voxel_fwd"]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=["no sample", "no query"])
def test_empty_inputs(shape: tuple[int, int]) -> None:
    ours, theirs = pair(8, 2, batch_first=True)
    x = _x(*shape, 8)
    out, weights = ours(x, x, x)
    assert out.shape == x.shape
    assert weights.shape == (*shape, shape[1])
    out.sum().backward()
    x, none = _x(2, 3, 8), _x(2, 0, 8)
    out, weights = ours(x, none, none)
    assert torch.equal(out, ours.out_proj.bias.expand_as(out))
    assert weights.shape == theirs(x, none, none)[1].shape == (2, 3, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_float_mask_of_another_type_is_taken(dtype: torch.dtype, need_weights: bool) -> None:
    ours, _ = pair(8, 2, batch_first=True)
    x, mask = _x(2, 4, 8), torch.randn(4, 4)
    expected = ours(x, x, x, attn_mask=mask.to(dtype).float(), need_weights=need_weights)
    actual = ours(x, x, x, attn_mask=mask.to(dtype), need_weights=need_weights)
    assert (actual[0] - expected[0]).abs().max() < 1e-6


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_gives_outputs_and_weights_in_its_type(need_weights: bool) -> None:
    ours, theirs = pair(16, 2, batch_first=True)
    x = _x(2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ours(x, x, x, padding(2, 9), need_weights=need_weights)
        expected = theirs(x, x, x, padding(2, 9), need_weights=need_weights)
    for a, b in zip(actual, expected, strict=True):
        if b is not None:
            assert a.dtype == b.dtype == torch.bfloat16
            assert (a - b).abs().max() < 0.03 * b.abs().max()


@pytest.mark.parametrize("batch_first", [False, True])
def test_outputs_are_contiguous_in_the_callers_layout(batch_first: bool) -> None:
    ours, _ = pair(8, 2, batch_first=batch_first)
    x = _x(3, 5, 8)
    for call in ({}, {"need_weights": False}, {"attn_mask": torch.zeros(*[5 if batch_first else 3] * 2)}):
        assert ours(x, x, x, **call)[0].is_contiguous()


class _CountProducts(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.products += name in ("linear", "addmm", "mm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dims", [2, 3])
def test_one_tensor_is_projected_once_and_results_do_not_depend_on_identity(dims: int) -> None:
    ours, _ = pair(8, 2)
    x = _x(*(4, 3, 8)[3 - dims :])
    others = [x.clone() for _ in range(2)]
    counts, outs = [], []
    for given in ((x, x, x), (x, others[0], others[0]), (x, others[0], others[1])):
        with torch.no_grad(), _CountProducts() as counter:
            outs.append(ours(*given)[0])
        counts.append(counter.products)
    assert counts == [2, 3, 4]  # with the output's
    assert all((out - outs[0]).abs().max() < 1e-5 for out in outs)


def test_inputs_and_masks_stay_as_they_are() -> None:
    ours, _ = pair(8, 2, batch_first=True)
    x, hidden, added = _x(2, 4, 8), padding(2, 4), torch.randn(4, 4)
    before = [t.clone() for t in (x, hidden, added)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for need_weights in (False, True):
            ours(x, x, x, hidden, need_weights)
            ours(x, x, x, hidden, need_weights, added)
    assert all(torch.equal(a, b) for a, b in zip((x, hidden, added), before, strict=True))


# weights and dropout


def test_weights_are_returned_by_default_and_have_columns_for_added_keys() -> None:
    ours, _ = pair(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    x = _x(2, 4, 8)
    assert ours(x, x, x)[1].shape == (2, 4, 6)
    assert ours(x, x, x, average_attn_weights=False)[1].shape == (2, 2, 4, 6)
    assert ours(x, x, x, need_weights=False)[1] is None


@pytest.mark.parametrize("average", [False, True])
def test_weights_are_those_that_were_applied_after_dropout(average: bool) -> None:
    ours, _ = pair(8, 2, batch_first=True, dropout=0.5, dtype=torch.float64)
    x, hidden = _x(3, 5, 8).double(), padding(3, 5)
    out, _ = ours(x, x, x, hidden)
    torch.manual_seed(1)
    out, weights = ours(x, x, x, hidden, average_attn_weights=average)
    torch.manual_seed(1)
    per_head = ours(x, x, x, hidden, average_attn_weights=False)[1]
    assert (per_head == 0).float().mean() > 0.5
    v = (x @ ours.in_proj_weight[16:].T + ours.in_proj_bias[16:]).view(3, 5, 2, 4)
    context = torch.einsum("nhij,njhd->nihd", per_head, v).flatten(-2)
    assert (ours.out_proj(context) - out).abs().max() < 1e-12
    assert (weights - (per_head.mean(1) if average else per_head)).abs().max() < 1e-12
    torch.manual_seed(1)
    assert torch.equal(ours(x, x, x, hidden)[0], out)  # the seed decides


@pytest.mark.parametrize("average", [False, True])
def test_weights_are_differentiable_after_dropout(average: bool) -> None:
    ours, _ = pair(6, 3, batch_first=True, dropout=0.4, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return ours(x, x, x, average_attn_weights=average)[1]

    assert torch.autograd.gradcheck(outputs, (x,))


def test_weights_never_gives_none_whatever_is_asked() -> None:
    ours, _ = pair(8, 2, weights="never")
    x = _x(3, 2, 8)
    assert ours(x, x, x)[1] is None
    assert ours(x, x, x, need_weights=True)[1] is None


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, tuple) else (result,):
            if isinstance(out, Tensor):
                self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return result


def test_averaged_weights_do_not_pass_through_those_of_the_heads() -> None:
    ours, _ = pair(16, 8, batch_first=True)
    x = _x(4, 512, 16)
    with _Largest() as largest:
        out, weights = ours(x, x, x)
        (out.sum() + weights.square().sum()).backward()
    assert 4 * 512 * 512 <= largest.elements <= 4 * 512 * 512 + 1
    assert largest.elements < 4 * 8 * 512 * 512


def test_dropout_is_of_weights_only_in_training_and_reproducible() -> None:
    ours, _ = pair(8, 2, dropout=0.3)
    x = _x(30, 40, 8)
    torch.manual_seed(3)
    first = ours(x, x, x, need_weights=False)[0]
    torch.manual_seed(3)
    assert torch.equal(ours(x, x, x, need_weights=False)[0], first)
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], first)
    kept = ours(x, x, x, average_attn_weights=False)[1] > 0
    assert abs(kept.float().mean() - 0.7) < 0.01
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    everything, _ = pair(8, 2, dropout=1.0)
    out, weights = everything(x, x, x)
    assert not weights.any()
    assert torch.equal(out, everything.out_proj.bias.expand_as(out))


# added keys, the causal hint, hidden rows


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("extra", ["add_bias_kv", "add_zero_attn"])
def test_added_keys_are_never_masked(extra: str, need_weights: bool) -> None:
    ours, theirs = pair(8, 2, batch_first=True, dtype=torch.float64, **{extra: True})
    x, hidden = _x(2, 4, 8).double(), torch.ones(2, 4).bool()
    for masking in ({"key_padding_mask": hidden}, {"attn_mask": torch.ones(4, 4).bool()}):
        call = {**masking, "need_weights": need_weights}
        expected = outputs_and_gradients(theirs, (x, x, x), call)
        assert not differences(outputs_and_gradients(ours, (x, x, x), call), expected, 1e-12)


def test_with_added_keys_the_hint_does_not_replace_the_mask() -> None:
    ours, theirs = pair(8, 2, batch_first=True, add_bias_kv=True)
    x, causal = _x(2, 4, 8), torch.ones(4, 4).triu(1).bool()
    expected = theirs(x, x, x, attn_mask=causal, need_weights=False)[0]
    hinted = ours(x, x, x, attn_mask=causal, need_weights=False, is_causal=True)[0]
    assert (hinted - expected).abs().max() < 1e-5


def test_with_other_lengths_the_hint_does_not_replace_the_mask() -> None:
    ours, theirs = pair(8, 2, batch_first=True)
    x, y, mask = _x(2, 4, 8), _x(2, 6, 8), torch.ones(4, 6).triu(3).bool()
    expected = theirs(x, y, y, attn_mask=mask, need_weights=False)[0]
    hinted = ours(x, y, y, attn_mask=mask, need_weights=False, is_causal=True)[0]
    assert (hinted - expected).abs().max() < 1e-5


@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"key_padding_mask": True}], ids=str)
def test_the_hint_with_padding_or_weights_leaves_the_mask_in_force(call: dict[str, Any]) -> None:
    ours, theirs = pair(8, 2, batch_first=True)
    x, causal = _x(2, 4, 8), torch.ones(4, 4).triu(1).bool()
    call = call | ({"key_padding_mask": padding(2, 4)} if "key_padding_mask" in call else {})
    with slow_path():
        expected = theirs(x, x, x, attn_mask=causal, is_causal=True, **call)[0]
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            actual = ours.eval()(x, x, x, attn_mask=causal, is_causal=True, **call)[0]
        assert (actual - expected).abs().max() < 1e-5


HIDDEN = ["bool keys", "float keys", "bool pairs", "float pairs"]


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_key_have_context_weights_and_gradients_of_zero(
    kind: str, need_weights: bool, dtype: torch.dtype
) -> None:
    ours, theirs = pair(8, 2, batch_first=True, dtype=dtype)
    x = _x(2, 4, 8).to(dtype)
    keys, pairs = torch.zeros(2, 4).bool(), torch.zeros(4, 4).bool()
    keys[1], pairs[2] = True, True
    mask = keys if "keys" in kind else pairs
    rows = torch.zeros(2, 4).bool()
    rows[(1, slice(None)) if "keys" in kind else (slice(None), 2)] = True
    if "float" in kind:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)
    call = {"key_padding_mask" if "keys" in kind else "attn_mask": mask}
    results = outputs_and_gradients(ours, (x, x, x), call | {"need_weights": need_weights})
    bias = ours.out_proj.bias
    assert (results["output"][rows] == bias).all()
    assert all(value.isfinite().all() for value in results.values())
    if need_weights:
        assert not results["weights"][rows].any()
        assert (results["weights"][~rows].sum(-1) - 1).abs().max() < 0.02
    else:
        expected = outputs_and_gradients(theirs, (x, x, x), call | {"need_weights": False})
        assert not differences(results, expected, 1e-5 if dtype == torch.float32 else 0.05)
    assert not results["query.grad"][1].any() or "pairs" in kind
    with torch.no_grad():
        assert (ours.eval()(x, x, x, **call, need_weights=need_weights)[0][rows] == bias).all()


# no mask is expanded; many short sequences are one launch


def test_padding_is_never_expanded_to_pairs_of_tokens() -> None:
    ours, _ = pair(8, 2, batch_first=True)
    x = _x(2, 400, 8)
    for call in ({}, {"key_padding_mask": padding(2, 400)}):
        with _Largest() as largest:
            ours(x, x, x, need_weights=False, **call)[0].sum().backward()
        assert largest.elements < 400 * 400


def test_many_sequences_are_one_launch_and_empty_ones_are_skipped() -> None:
    ours, _ = pair(8, 2, batch_first=True)
    x, hidden = _x(300, 5, 8), padding(300, 5)
    hidden[::2] = True
    explanation = vicinal.explain(ours, x, x, x, hidden, need_weights=False)
    if "the reference" in str(explanation):
        pytest.skip(str(explanation))
    with CountOps() as counter:
        out = ours(x, x, x, hidden, need_weights=False)[0]
    assert sum(counter.calls.values()) == 1
    assert (out[::2] == ours.out_proj.bias).all()
    from vicinal._multihead_attend import padded_segments
    from vicinal._voxel_plan import plan_of

    assert len(plan_of(padded_segments(hidden, 5, 0)).rows) == 150


@pytest.mark.parametrize("head_dim", [1, 3, 4, 6, 10, 13, 18, 24, 72, 129])
def test_any_head_dim(head_dim: int) -> None:
    ours, theirs = pair(2 * head_dim, 2, batch_first=True, dtype=torch.float64)
    x, hidden = _x(2, 5, 2 * head_dim).double(), padding(2, 5)
    for call in ({"key_padding_mask": hidden}, {"need_weights": False}):
        expected = outputs_and_gradients(theirs, (x, x, x), call)
        assert not differences(outputs_and_gradients(ours, (x, x, x), call), expected, 1e-12)


def test_explain_says_why_each_way_was_not_taken() -> None:
    ours, _ = pair(8, 2, batch_first=True)
    x = _x(2, 16, 8)
    explanation = vicinal.explain(ours, x, x, x)
    assert set(explanation.reasons) == {"segments", "windows", "sdpa", "dense"}
    assert explanation.reasons["sdpa"] == ["weights are wanted, and it does not return log-sum-exps"]
    mask = torch.zeros(16, 16, requires_grad=True)
    assert vicinal.explain(ours, x, x, x, None, False, mask).backend == "sdpa"
    assert vicinal.explain(ours, x, x, x, None, True, mask).backend == "dense"
    assert vicinal.explain(ours, x.to("meta"), x, x).backend == "torch"
    with pytest.raises(AssertionError, match="query has 9 channels"):
        vicinal.explain(ours, _x(2, 4, 9), x, x)
