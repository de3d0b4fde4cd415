"""Lets other code import this repository as one package, even if it has its own modules called `data` or `images`:

    sys.path.append("the folder that holds this one")
    strokes = importlib.import_module("the name of this folder")
    strokes.models.GenerativeModel()

Scripts and notebooks in this folder do not need it: they import `models`, `data` and so on directly. When modules of this
package execute the same import statements, these find the package's modules.
"""

import builtins
import importlib.machinery
import pkgutil
import sys

__version__ = "1.0.0"

_OURS = {module.name for module in pkgutil.iter_modules(__path__)}


def _import(name, globals=None, locals=None, fromlist=(), level=0):
    """Like the built-in __import__, but finds the repository's modules in this package"""
    first = name.partition(".")[0]
    if level or first not in _OURS:
        return builtins.__import__(name, globals, locals, fromlist, level)
    module = importlib.import_module(f"{__name__}.{name}")
    return module if fromlist else sys.modules[f"{__name__}.{first}"]  # a module in fromlist is imported when it is looked up


def _import_part(package, name):
    """Imports a module of a package when it is first accessed as an attribute"""
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"{package} has no {name}") from None


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        module.__builtins__ = {**vars(builtins), "__import__": _import}
        super().exec_module(module)
        if self.is_package(self.name):
            module.__getattr__ = lambda name: _import_part(self.name, name)


class _Finder:  # has no caches to invalidate
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name.startswith(f"{__name__}.") else None
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(name, spec.origin)
        return spec


def __getattr__(name):
    return _import_part(__name__, name)


sys.meta_path.insert(0, _Finder)
