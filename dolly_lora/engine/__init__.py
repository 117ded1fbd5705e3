"""The engine: what makes training and answering fast. Its face is small; the modules are its inside."""
from __future__ import annotations
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .decoder import Decoder
    from .step import Engine, make_engine

__all__ = ["Decoder", "Engine", "make_engine"]
_MODULES = {"Decoder": "decoder", "Engine": "step", "make_engine": "step"}


def __getattr__(name):
    "Import what is asked for when it is asked for: `import dolly_lora.engine` alone loads no torch."
    if name not in _MODULES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__(): return sorted([*globals(), *__all__])
