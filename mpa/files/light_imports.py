"""Torch, torchvision and transformers for a command, in two thirds of the time. Import this before them.

- torchvision and transformers import torch's compiler for a few decorators, and no command compiles. Here it is loaded
  when something asks it for more than these.
- Python's garbage collector looks through all objects again and again while so many are made, and once more at the
  end, where the system frees everything anyway. It leaves out what exists after these imports, and rests at the end.
"""

import atexit
import gc
import sys
from importlib import import_module, util
from types import ModuleType, SimpleNamespace

COMPILER = "torch._dynamo"


class _Compiler(ModuleType):
    """torch._dynamo with what is asked of it where nothing is compiled. It loads itself when asked for more."""

    def __getattr__(self, name):
        if name.startswith("__") and name != "__path__":  # the path is asked for before a submodule is imported
            raise AttributeError(name)
        self.__class__, self.__path__ = ModuleType, self.__spec__.submodule_search_locations
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _unchanged(function=None, *_, **__):
    """A decorator for the compiler, which has nothing to say where nothing is compiled."""
    return _unchanged if function is None else function


def _import_without_compiler() -> None:
    compiler = util.module_from_spec(util.find_spec(COMPILER))
    compiler.__class__ = _Compiler
    vars(compiler).update(
        dict.fromkeys(("disable", "assume_constant_result", "allow_in_graph", "graph_break"), _unchanged)
    )
    # accelerate asks whether a model is of this class: none is.
    compiler.eval_frame = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))
    utils = ModuleType(f"{COMPILER}.utils")
    utils.is_compile_supported = lambda device: import_module(utils.__name__).is_compile_supported(device)
    sys.modules |= {COMPILER: compiler, utils.__name__: utils}
    try:
        import_module("torchvision")
    finally:
        del sys.modules[utils.__name__]
    import_module("transformers.masking_utils")  # of the compiler, it imports one small file
    del compiler.__path__


if "transformers" not in sys.modules:
    gc.disable()
    import_module("torch")
    _import_without_compiler()
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    gc.freeze()
    gc.enable()
    atexit.register(gc.freeze)
