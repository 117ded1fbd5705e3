"""Instruction-tune LLaMA-2-7B with QLoRA on Dolly-15k, evaluate it, chat with it.

The names below are what most programs need. Each is loaded when it is first used, so that
`import dolly_lora` costs nothing; everything else is in the modules.
"""
import importlib
import sys
import types
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .chat import open_chat as open_chat
    from .config import PRESETS as PRESETS, Recipe as Recipe
    from .conversation import Chat as Chat
    from .data import build_prompt as build_prompt, load_dolly as load_dolly
    from .generate import generate as generate
    from .models import load_base as load_base, load_tokenizer as load_tokenizer
    from .models import load_tuned as load_tuned
    from .report import write_report as write_report
    from .train import train as train
    from .window import ChatUI as ChatUI

_MODULES = {  # name -> the module it is defined in
    "Recipe": "config", "PRESETS": "config", "load_dolly": "data", "build_prompt": "data",
    "load_base": "models", "load_tokenizer": "models", "load_tuned": "models", "train": "train",
    "generate": "generate", "Chat": "conversation", "ChatUI": "window", "open_chat": "chat",
    "write_report": "report"}
__all__ = [
    "PRESETS", "Chat", "ChatUI", "Recipe", "build_prompt", "generate", "load_base", "load_dolly",
    "load_tokenizer", "load_tuned", "open_chat", "train", "write_report"]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return sorted({*globals(), *_MODULES})


class _Package(types.ModuleType):
    def __setattr__(self, name, value):
        # Python sets an imported submodule on its package: `dolly_lora.train` stays the function
        if not (name in _MODULES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
