"""Import this first where only JAX, flax and optax are installed: the packages that programs do not
need while they compute (annotations, command lines, progress bars, images in files) become modules
whose names all stand for one class that does nothing."""

import importlib.util
import sys
import types


class _Everything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, _):
        return cls

    def __call__(cls, *_, **__):
        return cls


class Nothing(metaclass=_Everything):
    """Any of its attributes, items and calls is itself."""


class _Module(types.ModuleType):
    def __getattr__(self, name):
        return getattr(Nothing, name)


MISSING = [name for name in ("jaxtyping", "tyro", "tqdm", "PIL", "joblib")
           if importlib.util.find_spec(name) is None]  # fmt: skip
for name in MISSING:
    sys.modules[name] = _Module(name)
