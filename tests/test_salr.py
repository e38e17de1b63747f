"""SALR across modules' boundaries: the fused form equals the literal one, and FP32
parameters survive what a training script does to a model.
"""

import copy

import pytest
import torch
from torch import nn

from halo.method.salr import (
    SALR,
    HeadConverter,
    KeepFP32,
    fp32_parameter_names,
    salr_fused,
    salr_literal,
    state_map,
)

SIZES = [
    dict(b=2, l=7, i=3, j=5, h=6, o=2),
    dict(b=1, l=5, i=1, j=1, h=2, o=1),
    dict(b=3, l=1, i=2, j=1, h=7, o=5),
    dict(b=3, l=33, i=8, j=4, h=16, o=2),
    dict(b=2, l=40, i=8, j=4, h=128, o=2),
]
BARS = {torch.float32: 1e-5, torch.float64: 1e-10}


def arguments(compression, dtype, b, l, i, j, h, o):
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    )
    args = dict(x=new(b, j, l, h), state_heads=new(b, i, h), mask=new(i, j, h))
    if compression == 'linear':
        return args | dict(weight=new(i * j * h, o * h))
    return args | dict(
        weight=new(i * j * h, j * h), gain=new(i, j, h), out_weight=new(j * h, o * h)
    )


def value_and_grads(y, inputs):
    cotangent = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(y.dtype)
    return [y, *torch.autograd.grad((y * cotangent).sum(), inputs)]


def assert_equal(one, two, bar):
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() <= bar * b.abs().max()


@pytest.mark.parametrize('dtype', BARS)
@pytest.mark.parametrize('compression', ['linear', 'mlp_norm'])
@pytest.mark.parametrize('sizes', SIZES, ids=lambda s: '-'.join(map(str, s.values())))
def test_fused_function_equals_literal(sizes, compression, dtype):
    args = arguments(compression, dtype, **sizes)
    assert_equal(
        *(
            value_and_grads(f(**args), list(args.values()))
            for f in (salr_fused, salr_literal)
        ),
        BARS[dtype],
    )


@pytest.mark.parametrize('dtype', BARS)
@pytest.mark.parametrize('mask', ['real', 'sigmoid'])
@pytest.mark.parametrize('compression', ['linear', 'mlp_norm'])
def test_fused_module_equals_literal(compression, mask, dtype):
    torch.manual_seed(0)
    salr = SALR(5, 3, 4, 2, 6, compression, mask).to(dtype)
    k, v = (torch.randn(2, 4, 9, 6, dtype=dtype, requires_grad=True) for _ in 'kv')
    state = torch.randn(2, 5, dtype=dtype, requires_grad=True)
    inputs = [k, v, state, *salr.parameters()]
    both = [
        value_and_grads(torch.stack(f(k, v, state)), inputs)
        for f in (salr.forward_fused, salr.forward_literal)
    ]
    assert_equal(*both, BARS[dtype])


@pytest.mark.parametrize('compression', ['linear', 'mlp_norm'])
def test_non_contiguous_cache(compression):
    torch.manual_seed(0)
    salr = SALR(None, 3, 4, 2, 6, compression)
    kv, heads = torch.randn(2, 9, 4, 6).transpose(1, 2), torch.randn(2, 3, 6)
    torch.testing.assert_close(
        salr(kv, kv, heads), salr(kv.contiguous(), kv.contiguous(), heads)
    )


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.kv, self.salr, self.out = (
            nn.Linear(16, 32),
            SALR(5, 4, 2, 1, 8, **options),
            nn.Linear(16, 16),
        )

    def forward(self, x, state):
        k, v = self.kv(x).unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.out(torch.cat([y[:, 0] for y in self.salr(k, v, state)], -1))


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('mask', ['real', 'sigmoid'])
@pytest.mark.parametrize('compression', ['linear', 'mlp_norm'])
def test_every_mask_entry_moves_in_bf16_training(compression, mask, fused):
    torch.manual_seed(0)
    model = Model(compression=compression, mask=mask, fused=fused).bfloat16()
    start = {
        n: p.detach().clone() for n, p in model.named_parameters() if n.endswith('mask')
    }
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    for _ in range(20):
        x, s, y = (
            torch.randn(4, 12, 16).bfloat16(),
            torch.randn(4, 5).bfloat16(),
            torch.randn(4, 12, 16),
        )
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = model(x, s)
        assert out.dtype == torch.bfloat16
        opt.zero_grad()
        (out - y).square().mean().backward()
        opt.step()
    for name, p in model.named_parameters():
        if name in start:
            assert p.dtype == torch.float32 and (p != start[name]).all(), name


CASTS = dict(
    bfloat16=lambda m: m.bfloat16(),
    half=lambda m: m.half(),
    to=lambda m: m.to(torch.bfloat16),
    to_device=lambda m: m.to('cpu', torch.float16),
    type=lambda m: m.type(torch.bfloat16),
    meta=lambda m: m.to('meta', torch.bfloat16),
    copy=lambda m: copy.deepcopy(m).half(),
    empty=lambda m: m.to('meta').bfloat16().to_empty(device='cpu'),
)


@pytest.mark.parametrize('cast', CASTS)
def test_casts_do_not_narrow(cast):
    model = CASTS[cast](Model(compression='mlp_norm'))
    kept = set(fp32_parameter_names(model))
    assert kept == {n for n, _ in model.named_parameters() if n.startswith('salr.')}
    for name, p in model.named_parameters():
        assert (p.dtype == torch.float32) == (name in kept), name


def test_cast_keeps_values_gradients_and_the_optimizer_s_view():
    model = Model()
    model(torch.randn(2, 3, 16), torch.randn(2, 5)).sum().backward()
    mask, value, grad = (
        model.salr.k.mask,
        model.salr.k.mask.detach().clone(),
        model.salr.k.mask.grad.clone(),
    )
    model.bfloat16()
    assert (
        model.salr.k.mask is mask
        and torch.equal(mask, value)
        and torch.equal(mask.grad, grad)
        and mask.requires_grad
    )
    assert Model().double().salr.k.mask.dtype == torch.float64


@pytest.mark.parametrize('assign', [False, True])
def test_loading_a_bf16_checkpoint_widens(assign):
    narrow = {k: v.bfloat16() for k, v in Model().state_dict().items()}
    model = Model()
    model.load_state_dict(narrow, assign=assign)
    assert all(p.dtype == torch.float32 for p in model.salr.parameters())
    # the caller's dictionary is left alone
    assert all(v.dtype == torch.bfloat16 for v in narrow.values())


def test_built_under_a_bf16_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        modules = [SALR(5, 4, 2, 1, 8, 'mlp_norm'), HeadConverter(2, 1, 8)]
    finally:
        torch.set_default_dtype(torch.float32)
    for m in modules:
        assert isinstance(m, KeepFP32) and all(
            p.dtype == torch.float32 for p in m.parameters()
        )


@pytest.mark.parametrize('rows', [2, 8])
def test_a_compiled_layer_has_the_same_gradients(rows):
    "torch.compile once lost the folded sum's own gradient: SALR was not trained at all."
    torch.manual_seed(0)
    layer, found = SALR(8, 4, 4, 2, 32), []
    k, v = torch.randn(2, rows, 4, 5, 32)
    state = torch.randn(rows, 8)
    for f in (layer, torch.compile(layer, backend='aot_eager')):
        layer.zero_grad()
        sum(x.pow(2).sum() for x in f(k, v, state)).backward()
        found.append({n: p.grad.clone() for n, p in layer.named_parameters()})
    for name, grad in found[0].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('samples', [2, 7])
def test_the_state_map_has_first_and_second_derivatives(samples):
    "Both ways of making A on a CPU, by finite differences."
    g = torch.Generator().manual_seed(0)
    new = lambda *d: torch.randn(*d, generator=g, dtype=torch.float64).requires_grad_()
    parts = new(2 * 2 * 3, 4), new(2, 2, 3), new(samples, 2, 3)
    assert torch.autograd.gradcheck(state_map, parts)
    assert torch.autograd.gradgradcheck(state_map, parts)
