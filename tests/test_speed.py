"""One step: what the fast engine computes is what PEFT and autograd compute."""
import random
from dataclasses import replace

import pytest
import torch

from dolly_lora.engine import kernels
from dolly_lora.engine.blocks import (FlatParameters, LoRAGroup, Workspace, group_backward,
                                     group_forward)
from dolly_lora.engine.memory import MemoryPlan
from dolly_lora.engine.packing import pack, share_out
from dolly_lora.engine.step import FusedLlama, make_engine
from dolly_lora.hardware import multiplies_fp8
from dolly_lora.models import load_base, tiny_model
from dolly_lora.trainer import collate
from toys import (COVERED, TINY, adapted, gradients, needs_gpu, plain_engine, random_model,
                  save_small_llama, some)


def test_every_example_is_in_one_row():
    random.seed(0)
    for _ in range(300):
        lengths = [random.randrange(1, 1024) for _ in range(random.randrange(1, 17))]
        budget = random.randrange(100, 9000)
        rows = share_out(lengths, budget)
        assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in r) <= budget or len(r) == 1 for r in rows)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_add_up_to_the_step(dropout):
    """However a step is shared out over batches, it is the same step, dropout included."""
    examples, results = some(8), []
    num_items = (pack(examples).targets != -100).sum()
    for budget in (2000, 300, 1):
        model = adapted(tiny_model(), replace(TINY, lora_dropout=dropout))
        engine = FusedLlama(model, MemoryPlan(True, budget == 300, budget))
        batches = collate(examples, budget)["rows"]
        loss = sum(engine.loss(b, num_items, 5, True) for b in batches)
        results.append((len(batches), loss, engine.flat.grad.clone()))
    assert results[0][0] == 1 and results[2][0] == 8
    for r in results[1:]:
        torch.testing.assert_close(r[1], results[0][1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(r[2], results[0][2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_fp8_are_as_near_as_eight_numbers_a_power_of_two_allow(dtype):
    torch.manual_seed(0)
    x = torch.randn(60, 300, dtype=dtype) * 10.0 ** torch.arange(-30, 30)[:, None]
    rows, scales = kernels.quantise_rows(x)
    assert rows.dtype == torch.float8_e4m3fn and scales.shape == (60, 1)
    top, back = x.abs().amax(1, keepdim=True).float(), rows.float() * scales
    assert (rows.float().abs().amax(1) == 448).all()
    error = (back - x.float()).abs()
    assert (error <= x.float().abs() / 16 * 1.001 + top * 2.0**-10 / 448).all()
    assert (error / top).max() <= 16 / 448 * 1.001   # half the step below the largest


def test_zeros_and_what_fp8_has_stay_what_they_are():
    exact = torch.tensor([[448.0, -1.125, 0.0, 2.0**-9], [0.0, 0.0, 0.0, 0.0]])
    rows, scales = kernels.quantise_rows(exact)
    assert torch.equal(rows.float(), exact) and scales[0] == 1
    product = kernels.fp8_product((rows, scales), (rows, scales), torch.float32)
    assert torch.equal(product, exact @ exact.t())


def step_and_gradients(plan, recipe=TINY, **more):
    model = adapted(load_base(recipe), recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = FusedLlama(model, plan, **more)
    loss = engine.loss(pack(some()), 100, 7, gradient=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return loss, engine.flat.grad.clone()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_in_fp8_is_near_the_exact_one(recompute, dropout):
    """Its loss within 1 %, its gradient at a cosine of 0.99 or more; the weights untouched."""
    recipe, plan = replace(TINY, lora_dropout=dropout), MemoryPlan(True, recompute, 1024)
    exact, in_fp8 = (step_and_gradients(replace(plan, fp8=fp8), recipe, ops=kernels.PLAIN)
                     for fp8 in (False, True))
    assert 0 < abs(in_fp8[0] / exact[0] - 1) < 0.01
    assert torch.cosine_similarity(exact[1], in_fp8[1], 0) > 0.99


def test_what_is_not_learnt_from_is_exact():
    plan, batch = MemoryPlan(True, False, 1024), pack(some())
    exact, in_fp8 = (FusedLlama(adapted(load_base(TINY)), replace(plan, fp8=fp8), ops=kernels.PLAIN)
                     for fp8 in (False, True))
    learnt = in_fp8.loss(batch, 100, gradient=True)
    assert in_fp8.loss(batch, 100) == exact.loss(batch, 100) != learnt
    assert torch.equal(in_fp8.logits(batch), exact.logits(batch))


def test_in_fp8_the_adapters_read_the_numbers_as_they_are():
    """Of a group, only the two frozen products differ; its biases are added to them."""
    torch.manual_seed(0)
    x, grad, results = torch.randn(50, 64), torch.randn(50, 192), []
    for hold in (LoRAGroup.hold_weight, LoRAGroup.hold_fp8):
        attention = adapted(tiny_model().cpu()).get_base_model().model.layers[0].self_attn
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        for layer in layers[:2]:
            layer.base_layer.bias = torch.nn.Parameter(torch.full((layer.out_features,), 2.0))
        group = LoRAGroup(layers, 0, Workspace(), kernels.PLAIN)
        hold(group, torch.float32)
        flat = FlatParameters(group.A + group.B)
        group.bind(0, flat.whole.data, flat.grad)
        grad = grad[:, :group.shape[0]].contiguous()
        with torch.no_grad():
            y, saved = group_forward(group, x)
            results.append((saved.h, flat.grad, y, group_backward(group, grad, x, saved)))
    exact, in_fp8 = results
    assert torch.equal(exact[0], in_fp8[0]) and torch.equal(exact[1], in_fp8[1])
    for a, b in zip(exact[2:], in_fp8[2:]):
        assert 0 < (a - b).norm() / a.norm() < 0.05


def test_half_precision_as_on_a_t4():
    """fp16 weights and activations, float32 adapters and gradients, the loss kept large:
    near the float32 step, nothing overflows."""
    batch, results = pack(some()), []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0**16)):
        engine = FusedLlama(adapted(tiny_model().to(dtype)), MemoryPlan(True, True, 1024))
        assert engine.flat.whole.dtype == engine.flat.grad.dtype == torch.float32
        assert engine.low.dtype == dtype
        loss = engine.loss(batch, 300 / scale, 1, True)
        results.append((loss / scale, engine.flat.grad / scale))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=0)
    assert (results[1][1] - results[0][1]).norm() < 0.01 * results[0][1].norm()


def test_rows_of_a_step_drop_on_their_own_on_the_plain_path():
    engine = plain_engine(adapted(tiny_model(), replace(TINY, lora_dropout=0.5)))
    losses = [engine.loss(pack(some(1), [start]), 1.0, 3) for start in (0, 0, 500)]
    assert losses[0] == losses[1] != losses[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small_llama(tmp_path_factory.mktemp("small") / "base")


def dequantised(recipe):
    """The NF4 base as plain float32 linears: the truth that bf16 is measured against."""
    from bitsandbytes.functional import dequantize_4bit
    model = load_base(recipe)
    four_bit = [(n, m) for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"]
    for name, m in four_bit:
        plain = torch.nn.Linear(m.in_features, m.out_features, bias=False)
        weight = dequantize_4bit(m.weight.data, m.weight.quant_state)
        plain.weight = torch.nn.Parameter(weight)
        model.set_submodule(name, plain)
    model.is_quantized = model.is_loaded_in_4bit = False
    return model.float()


PLANS = [MemoryPlan(True, False, 8192), MemoryPlan(False, False, 8192),
         MemoryPlan(False, True, 2048)]


@needs_gpu
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_gpu_bf16_is_as_near_to_the_truth_as_the_plain_path(small, plan):
    """Truth: the dequantised weights in float32. The fast path may be no further from it
    than PEFT in bf16 is, with a little room."""
    recipe, batch, results = replace(small, lora_dropout=0.0), pack(some(16)), []
    for load, make in ((dequantised, plain_engine), (load_base, plain_engine),
                       (load_base, lambda m: FusedLlama(m, plan))):
        model = adapted(load(recipe), recipe)
        engine = make(model)
        loss = engine.loss(batch, 100, gradient=True).double()
        results.append((loss, gradients(engine, model).double(),
                        engine.logits(batch).detach().double()))
    assert abs(results[2][0] / results[0][0] - 1) < 1e-4  # one number, in which errors cancel
    for true, plain, fast in list(zip(*results))[1:]:
        ours, theirs = (fast - true).norm(), (plain - true).norm()
        assert ours <= 1.25 * theirs + 1e-6, (ours / true.norm(), theirs / true.norm())


@needs_gpu
@pytest.mark.parametrize("shape", ["llama", "mistral", "qwen2", "qwen3"])
def test_gpu_kernels_equal_the_formulas_in_a_whole_step(shape):
    batch, results = pack(some(16)), []
    for ops in (kernels.PLAIN, kernels.TRITON):
        model = adapted(random_model(COVERED[shape]).cuda())
        engine = FusedLlama(model, MemoryPlan(True, False, 8192), graphs=False, ops=ops)
        results.append((engine.loss(batch, 100, gradient=True), engine.flat.grad.clone()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    assert (results[1][1] - results[0][1]).norm() < 1e-4 * results[0][1].norm()


@needs_gpu
@pytest.mark.parametrize("shape", ["mistral", "qwen2", "qwen3"])
def test_gpu_a_replayed_step_is_the_launched_one(shape):
    batch, results = pack(some(16)), []
    for graphs in (False, True):
        model = adapted(random_model(COVERED[shape]).cuda().bfloat16())
        model.get_base_model().model.rotary_emb.float()
        engine = FusedLlama(model, MemoryPlan(True, False, 8192), graphs=graphs)
        assert bool(engine.graphs) is graphs
        engine.flat.start()
        results.append((engine.step(batch, 100, 7), engine.flat.grad.clone()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-3)
    assert torch.cosine_similarity(results[0][1], results[1][1], 0) > 0.999


needs_fp8 = pytest.mark.skipif(not multiplies_fp8(), reason="no GPU that multiplies FP8")


@needs_fp8
@pytest.mark.parametrize("features", [64, 4096, 22016])
def test_gpu_rows_in_fp8_equal_the_formula_and_their_product_is_near(features):
    torch.manual_seed(0)
    x, w = (torch.randn(n, features, device="cuda", dtype=torch.bfloat16) for n in (301, 512))
    x[7], x[8] = 0, x[8] * 1000
    rows = [f(x) for f in (kernels.PLAIN.quantise_rows, kernels.TRITON.quantise_rows)]
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(*rows))
    (a, s), (b, t) = rows[1], kernels.TRITON.quantise_rows(w)
    ours = kernels.fp8_product((a, s), (b, t), torch.bfloat16).float()
    dequantised = (a.float() * s) @ (b.float() * t).t()
    assert not ours[7].any()
    each = (ours - dequantised).norm(dim=1) / dequantised.norm(dim=1).clamp(min=1e-6)
    assert each.max() < 0.02, each.max()


@needs_fp8
def test_gpu_a_replayed_step_in_fp8_is_near_the_exact_one(small):
    recipe, batch, results = replace(small, lora_dropout=0.0), pack(some(16)), []
    for fp8 in (False, True):
        model = adapted(load_base(recipe), recipe)
        engine = make_engine(model, replace(recipe, precision="fp8" if fp8 else "auto"))
        engine.flat.start()
        assert engine.plan.fp8 is fp8 and engine.graphs
        results.append((engine.step(batch, 100, 7), engine.flat.grad.clone()))
        torch.testing.assert_close(engine.loss(batch, 100, 7, True), results[-1][0],
                                   rtol=1e-3, atol=1e-3)
    assert 0 < abs(results[1][0] / results[0][0] - 1) < 0.02
    assert torch.cosine_similarity(results[0][1], results[1][1], 0) > 0.98
