"""One step: what the fast engine computes is what PEFT and autograd compute."""
import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dolly_lora.engine import kernels
from dolly_lora.engine.memory import MemoryPlan
from dolly_lora.engine.packing import pack, share_out
from dolly_lora.engine.step import FusedLlama
from dolly_lora.models import load_base, tiny_model
from dolly_lora.trainer import collate
from toys import (SHAPE, TINY, adapted, gradients, needs_gpu, plain_engine, save_small_llama,
                  some)


def test_every_example_is_in_one_row():
    random.seed(0)
    for _ in range(300):
        lengths = [random.randrange(1, 1024) for _ in range(random.randrange(1, 17))]
        budget = random.randrange(100, 9000)
        rows = share_out(lengths, budget)
        assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in r) <= budget or len(r) == 1 for r in rows)


@pytest.mark.parametrize("rank, heads", [(16, 2), (4, 4), (20, 1)])
def test_step_equals_peft_for_other_ranks_and_heads(rank, heads):
    config = LlamaConfig(**SHAPE, num_hidden_layers=3, num_key_value_heads=heads,
                         tie_word_embeddings=heads == 1)
    batch, results = pack(some()), []
    for make in (plain_engine, lambda m: FusedLlama(m, MemoryPlan(True, True, 1024))):
        torch.manual_seed(0)
        model = adapted(LlamaForCausalLM(config), replace(TINY, lora_r=rank))
        engine = make(model)
        results.append((engine.loss(batch, 10, gradient=True), gradients(engine, model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-5)


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
def test_gpu_kernels_equal_the_formulas_in_a_whole_step():
    batch, results = pack(some(16)), []
    for ops in (kernels.PLAIN, kernels.TRITON):
        model = adapted(load_base(TINY))
        engine = FusedLlama(model, MemoryPlan(True, False, 8192), graphs=False, ops=ops)
        results.append((engine.loss(batch, 100, gradient=True), engine.flat.grad.clone()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)
