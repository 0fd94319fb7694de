"""The algebra against torch's own convolutions, over every kernel, stride, dilation, padding and group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dslib.algebra import affine
from dslib.algebra.affine import Affine
from dslib.algebra.layers import from_batchnorm
from dslib.errors import NotMergeable

CLOSE = {"rtol": 0, "atol": 1e-10}
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
sides = st.tuples(*[st.integers(0, 3)] * 4)
crops = st.tuples(*[st.integers(-2, 3)] * 4)


@st.composite
def maps(draw, c_in: int, padded: bool = True) -> Affine:
    """A random map from c_in channels."""
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if c_in % g == 0]))
    c_out = groups * draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(c_out, c_in // groups, *draw(pairs), dtype=torch.float64, generator=generator)
    bias = torch.randn(c_out, dtype=torch.float64, generator=generator) if draw(st.booleans()) else None
    return Affine(weight, bias, draw(pairs), draw(pairs), draw(crops) if padded else affine.NO_PADDING, groups)


def images(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 37, 41, dtype=torch.float64)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_compose_is_one_after_the_other(data):
    first = data.draw(maps(4))
    second = data.draw(maps(first.weight.shape[0], padded=False))
    whole = affine.compose(first, second)
    x = images(4)
    torch.testing.assert_close(whole(x), second(first(x)), **CLOSE)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_padding_after_a_bias_free_pointwise_map_is_padding_of_the_input(data):
    second = data.draw(maps(4))
    pointwise = Affine(torch.randn(4, 2, 1, 1, dtype=torch.float64), groups=2)
    x = images(4)
    torch.testing.assert_close(affine.compose(pointwise, second)(x), second(pointwise(x)), **CLOSE)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_add_sums_aligned_branches(data):
    stride, groups = data.draw(pairs), data.draw(st.sampled_from([(1, 1), (2, 4), (1, 4)]))
    branches = []
    for g in groups:
        (k_v, k_h), (d_v, d_h) = data.draw(pairs), data.draw(pairs)
        top, left = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
        bottom, right = d_v * (k_v - 1) - top, d_h * (k_h - 1) - left  # the output keeps ceil(size / stride)
        weight = torch.randn(4, 4 // g, k_v, k_h, dtype=torch.float64)
        bias = torch.randn(4, dtype=torch.float64) if data.draw(st.booleans()) else None
        branches.append(Affine(weight, bias, stride, (d_v, d_h), (left, right, top, bottom), g))
    a, b = branches
    x = images(4)
    torch.testing.assert_close(affine.add(a, b)(x), a(x) + b(x), **CLOSE)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_cropping_the_output_is_cropping_the_input(data):
    whole, crop = data.draw(maps(4)), data.draw(sides)
    x = images(4)
    expected = nn.functional.pad(whole(x), [-side for side in crop])
    left, right, top, bottom = (-side for side in crop)
    torch.testing.assert_close(affine.pad_output(whole, (left, right, top, bottom))(x), expected, **CLOSE)


def test_batchnorm_is_a_scale_and_a_shift():
    bn = nn.BatchNorm2d(3, eps=0.1).double().eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    x = images(3)
    torch.testing.assert_close(from_batchnorm(bn)(x), bn(x), **CLOSE)


def test_identity_and_regroup_change_nothing():
    x = images(4)
    torch.testing.assert_close(affine.identity(4)(x), x, rtol=0, atol=0)
    torch.testing.assert_close(affine.regroup(affine.identity(4), 2)(x), x, rtol=0, atol=0)


def test_shapes_are_predicted_on_meta_without_weights():
    first = Affine(torch.empty(8, 4, 1, 1, device="meta"))
    second = Affine(torch.empty(8, 1, 3, 3, device="meta"), stride=(2, 2), groups=8)
    whole = affine.compose(first, affine.compose(second, second))
    assert whole.weight.is_meta
    assert (whole.weight.shape, whole.stride) == ((8, 4, 7, 7), (4, 4))


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (Affine(torch.ones(3, 2, 1, 1)), Affine(torch.ones(2, 2, 1, 1)), "3 output channels, the second expects 2"),
        (
            Affine(torch.ones(2, 2, 1, 1), torch.ones(2)),
            Affine(torch.ones(2, 2, 3, 3), padding=(1, 1, 1, 1)),
            "hoist the padding",
        ),
        (Affine(torch.ones(2, 2, 3, 3)), Affine(torch.ones(2, 2, 3, 3), padding=(1, 1, 1, 1)), "kernel \\(3, 3\\)"),
    ],
)
def test_compose_refuses_what_is_not_one_convolution(first, second, text):
    with pytest.raises(NotMergeable, match=text):
        affine.compose(first, second)


def test_padding_what_was_cropped_is_refused():
    with pytest.raises(NotMergeable, match="hoist the padding"):
        affine.pad_output(Affine(torch.ones(2, 2, 1, 1), padding=(-1, 0, 0, 0)), (1, 0, 0, 0))


def test_add_refuses_branches_that_do_not_fit():
    a = Affine(torch.ones(2, 2, 3, 3), padding=(1, 1, 1, 1))
    with pytest.raises(NotMergeable, match="differ in size"):
        affine.add(a, Affine(torch.ones(2, 2, 3, 3)))
    with pytest.raises(NotMergeable, match="stride"):
        affine.add(a, Affine(torch.ones(2, 2, 3, 3), stride=(2, 2), padding=(1, 1, 1, 1)))


def test_batchnorm_without_statistics_is_refused():
    with pytest.raises(NotMergeable, match="track them"):
        from_batchnorm(nn.BatchNorm2d(2, track_running_stats=False))
