"""Lets other code import this repository as one package, even if it has its own modules called `data` or `images`:

    sys.path.append("the folder that holds this one")
    strokes = importlib.import_module("the name of this folder")
    strokes.models.GenerativeModel()

Scripts and notebooks in this folder do not need it: they import `models`, `data` and so on directly. When modules of this
package execute the same import statements, these find the package's modules.
"""

import builtins
import importlib.machinery
import importlib.util
import pathlib
import sys

__version__ = "1.0.0"

_FOLDER = pathlib.Path(__file__).resolve().parent
_OURS = {
    path.parent.name if path.stem == "__init__" else path.stem
    for path in [*_FOLDER.glob("*.py"), *_FOLDER.glob("*/__init__.py")]
}


def _import(name, globals=None, locals=None, fromlist=(), level=0):
    """Like the built-in __import__, but finds the repository's modules in this package"""
    first = name.partition(".")[0]
    if level or first not in _OURS:
        return builtins.__import__(name, globals, locals, fromlist, level)
    module = importlib.import_module(f"{__name__}.{name}")
    for wanted in fromlist or ():
        if not hasattr(module, wanted):
            importlib.import_module(f"{__name__}.{name}.{wanted}")
    return module if fromlist else sys.modules[f"{__name__}.{first}"]


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
        if not name.startswith(f"{__name__}."):
            return None
        place = _FOLDER.joinpath(*name.removeprefix(f"{__name__}.").split("."))
        file, locations = (place / "__init__.py", [str(place)]) if place.is_dir() else (place.with_suffix(".py"), None)
        if not file.is_file():
            return None
        loader = _Loader(name, str(file))
        return importlib.util.spec_from_file_location(name, file, loader=loader, submodule_search_locations=locations)


def __getattr__(name):
    return _import_part(__name__, name)


sys.meta_path.insert(0, _Finder)
