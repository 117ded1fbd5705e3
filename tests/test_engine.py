"""Which engine, which kernels and which attention are chosen, and the engine's small face."""
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GraniteConfig, MistralConfig

import dolly_lora.engine
from dolly_lora.config import DollyError
from dolly_lora.engine import Decoder, Engine, kernels, make_engine, packing
from dolly_lora.engine.blocks import is_fusable, is_decodable, is_covered
from dolly_lora.engine.memory import MemoryPlan, plan_memory
from dolly_lora.engine.packing import PackedModel, pack
from dolly_lora.engine.step import FusedLlama
from dolly_lora.hardware import multiplies_fp8
from dolly_lora.models import tiny_model
from toys import SHAPE, TINY, adapted, plain_engine, some


def made(config, **more):
    """A model of one layer with another architecture, and adapters."""
    shape = SHAPE | dict(num_hidden_layers=1, num_key_value_heads=2) | more
    return adapted(AutoModelForCausalLM.from_config(config(**shape)))


@pytest.mark.parametrize("capability, fast", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_fallbacks_choose_themselves(capability, fast):
    cuda = torch.device("cuda")
    with patch("torch.cuda.is_available", return_value=True), \
         patch("torch.cuda.get_device_capability", return_value=capability):
        assert packing.has_varlen(cuda, torch.bfloat16) is fast
        assert not packing.has_varlen(cuda, torch.float32)
        assert not packing.has_varlen("cpu", torch.bfloat16)
        chosen = kernels.TRITON if fast and kernels.triton else kernels.PLAIN
        assert kernels.operations(cuda) is kernels.operations(cuda, rank=128) is chosen
        assert kernels.operations(cuda, rank=129) is kernels.PLAIN
        assert kernels.operations("cpu") is kernels.PLAIN
    assert kernels.operations("cpu") is kernels.PLAIN


@pytest.mark.parametrize("capability, can", [((8, 0), False), ((8, 9), False), ((9, 0), True)])
def test_which_cards_multiply_fp8(capability, can):
    with patch("torch.cuda.is_available", return_value=True), \
         patch("torch.cuda.get_device_capability", return_value=capability):
        assert multiplies_fp8("cuda") is multiplies_fp8() is can
        assert not multiplies_fp8("cpu")


def test_fp8_is_refused_in_one_line_where_it_cannot_be():
    recipe = replace(TINY, precision="fp8")
    with pytest.raises(DollyError, match="needs a Hopper card.*: set precision=auto") as card:
        make_engine(adapted(tiny_model()).cpu(), recipe)
    with pytest.raises(DollyError, match="is for llama, mistral.*: set precision=auto") as shape:
        make_engine(made(GraniteConfig), recipe)
    with pytest.raises(DollyError, match="1 GiB are too few: set precision=auto") as memory:
        plan_memory(adapted(tiny_model()), recipe, free=2**30)
    assert not any("\n" in str(error.value) for error in (card, shape, memory))


def test_fp8_is_refused_before_anything_is_measured_or_started(tmp_path, monkeypatch):
    from dolly_lora import bench, cli
    measured = []
    monkeypatch.setattr(bench, "measure_step", lambda *args: measured.append(args))
    monkeypatch.setattr("dolly_lora.engine.step.multiplies_fp8", lambda device: False)
    with pytest.raises(DollyError, match="needs a Hopper card"):
        bench.bench(TINY, ["stock", "fp8"])
    with pytest.raises(DollyError, match="needs a Hopper card"):
        cli.preflight(replace(TINY, precision="fp8"), tmp_path)
    assert not measured


def test_a_plan_in_fp8_holds_weights_and_activations():
    plan = plan_memory(adapted(tiny_model()), replace(TINY, precision="fp8"), free=2**36)
    assert plan.fp8 and plan.keep_weights and not plan.recompute and "in FP8" in str(plan)
    exact = plan_memory(adapted(tiny_model()), TINY, free=2**36)
    assert replace(exact, fp8=True) == plan


def test_a_model_with_its_own_scale_of_the_scores():
    granite = made(GraniteConfig, attention_multiplier=0.7)
    ids = torch.tensor(some(1)[0]["input_ids"])
    expected = granite.eval()(input_ids=ids[None]).logits[0]
    ours = plain_engine(granite).logits(pack(some(1)))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_a_short_window_is_refused():
    mistral = plain_engine(made(MistralConfig, sliding_window=8))
    with pytest.raises(DollyError, match="window of 8"):
        mistral.loss(pack(some()), 1.0)


def mistral(window):
    torch.manual_seed(0)
    return made(MistralConfig, sliding_window=window)


def test_a_window_must_be_as_long_as_the_texts():
    short = mistral(window=255)
    assert is_covered(short, 255) and is_fusable(short, 255) and is_decodable(short, 255)
    assert not (is_covered(short, 256) or is_fusable(short, 256) or is_decodable(short, 256))
    assert isinstance(make_engine(short, TINY), PackedModel)    # max_length=256
    assert not plan_memory(short, TINY).keep_weights
    assert isinstance(make_engine(short, replace(TINY, max_length=255)), FusedLlama)
    with pytest.raises(DollyError, match="up to 1,024 tokens"):
        FusedLlama(short, MemoryPlan(True, False, 1024))
    with pytest.raises(DollyError, match="up to 256 tokens"):
        Decoder(short, 2, slots=1, capacity=256, max_new_tokens=8)


def some_linears_only():
    return get_peft_model(tiny_model(), LoraConfig(target_modules=["v_proj"]))


@pytest.mark.parametrize("model", [
    lambda: made(GraniteConfig),                                     # factors on everything
    lambda: made(GraniteConfig).get_base_model(),
    some_linears_only,
    lambda: some_linears_only().get_base_model(),                    # PEFT's layers, no PeftModel
], ids=["granite", "granite's base", "adapters on some linears", "a base with them"])
def test_what_the_blocks_do_not_compute_is_refused(model):
    model = model()
    with pytest.raises(DollyError, match="make_engine"):
        FusedLlama(model, MemoryPlan(True, False, 1024))
    with pytest.raises(DollyError, match="`generate`"):
        Decoder(model, 2, slots=1, capacity=64, max_new_tokens=8)


def test_a_bias_in_a_linear_is_seen_whatever_the_config_says():
    batch, logits = pack(some(2)), []
    for make in (plain_engine, lambda m: FusedLlama(m, MemoryPlan(True, False, 1024))):
        model = adapted(tiny_model())
        linear = model.get_base_model().model.layers[-1].self_attn.k_proj.base_layer
        linear.bias = torch.nn.Parameter(torch.arange(linear.out_features) / 10)
        logits.append(make(model).logits(batch))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused():
    decoder = Decoder(tiny_model(), 2, slots=2, capacity=20, max_new_tokens=8)
    draws = torch.zeros(2, 8)
    with pytest.raises(DollyError, match="13 tokens and 8 new ones exceed the 20"):
        decoder.prefill([0, 1], [[5], [5] * 13], [0, 0], draws)
    decoder.prefill([0, 1], [[5], [5] * 12], [0, 0], draws)
    while decoder.active.any():
        decoder.step()
    assert decoder.count.min() > 0


def test_the_plain_engines_logits_are_without_dropout_and_gradients():
    model = adapted(tiny_model(), replace(TINY, lora_dropout=0.5))
    engine, batch = plain_engine(model), pack(some(2))
    model.train()
    logits = engine.logits(batch)
    assert torch.equal(logits, engine.logits(batch)) and not logits.requires_grad
    assert model.training                                            # as it was
    theirs = FusedLlama(model, MemoryPlan(True, False, 1024)).logits(batch)
    torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)


def test_both_engines_are_engines():
    for model in (adapted(tiny_model()), made(GraniteConfig)):
        engine = make_engine(model, TINY)
        assert isinstance(engine, Engine)
        engine.flat.start()
        engine.step(pack(some()), 100, 1)
        assert engine.flat.grad.abs().sum() > 0    # where the optimizer looks for it
        assert engine.logits(pack(some(1))).shape[1] == 512


def test_the_face_is_small_and_loads_nothing_by_itself():
    assert dolly_lora.engine.__all__ == ["Decoder", "Engine", "make_engine"]
    assert {"Decoder", "Engine", "make_engine"} <= set(dir(dolly_lora.engine))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        dolly_lora.engine.nothing_of_the_kind
    code = "import sys, dolly_lora.engine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
