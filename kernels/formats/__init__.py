"""The block formats: one class each. A file that is put into this folder is found, and its classes enter FORMATS."""

import importlib
import pkgutil

from ..products.loops import Products

for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_file.name}")
    for _class in list(vars(_module).values()):
        if isinstance(_class, type) and issubclass(_class, Products) and _class.__module__ == _module.__name__:
            if not hasattr(_class, "TYPE"):
                raise TypeError(f"{_module.__file__}: class {_class.__name__} does not state its TYPE")
