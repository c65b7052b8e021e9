"""Makes torch say that the processor has neither AVX-512 nor AMX; a folder for PYTHONPATH.

vLLM chooses the library of its kernels by what torch says, and no variable of either changes that.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HIDDEN = ("avx512", "amx", "avx10")


class _Hide(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `torch.cpu` where it is, and replaces one function of it when it has been loaded."""

    _loader: Any = None

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        known = module.get_capabilities

        def get_capabilities() -> dict[str, Any]:
            return {k: not k.startswith(HIDDEN) and v for k, v in known().items()}

        module.get_capabilities = get_capabilities  # type: ignore[attr-defined]


sys.meta_path.insert(0, _Hide())
