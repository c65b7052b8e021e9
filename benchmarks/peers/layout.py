"""Where everything of the comparison lies: one folder, which may be deleted at any time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DEFAULT_ROOT", "Layout"]

DEFAULT_ROOT = Path("build/peers")


@dataclass(frozen=True)
class Layout:
    """Names inside the folder ``root``."""

    root: Path

    def venv(self, peer: str) -> Path:
        """The virtual environment of one peer."""
        return self.root / "venvs" / peer

    def python(self, peer: str) -> Path:
        """Its interpreter."""
        return self.venv(peer) / "bin" / "python"

    def stamp(self, step: str) -> Path:
        """The file that says that a step of the set-up is done, and with which inputs."""
        return self.root / "stamps" / f"{step}.json"

    @property
    def model(self) -> Path:
        """The weights that all serve: a Hugging Face folder in bf16."""
        return self.root / "model"

    def gguf(self, kind: str) -> Path:
        """The weights as llama.cpp reads them; ``kind`` as llama.cpp writes it, in lower case."""
        return self.root / "gguf" / f"model-{kind}.gguf"

    def openvino(self, weight_format: str) -> Path:
        """The weights as OpenVINO reads them."""
        return self.root / "openvino" / weight_format

    @property
    def openvino_avx2(self) -> Path:
        """The library that hides AVX-512 from OpenVINO."""
        return self.root / "openvino" / "without_avx512.so"

    @property
    def llama_source(self) -> Path:
        """The source archive of llama-cpp-python, unpacked."""
        return self.root / "llama" / "source"

    def llama_build(self, isa: str) -> Path:
        """A build tree of llama.cpp."""
        return self.root / "llama" / f"build-{isa}"

    def llama_bin(self, isa: str) -> Path:
        """llama.cpp's programs, with the CPU library of one instruction set beside them."""
        return self.root / "llama" / f"bin-{isa}"

    @property
    def tcmalloc(self) -> Path:
        """The allocator that vLLM's documentation asks for; may be missing."""
        return self.root / "tcmalloc" / "usr/lib/x86_64-linux-gnu" / "libtcmalloc_minimal.so.4"

    @property
    def logs(self) -> Path:
        """Logs of the servers, one for each start."""
        return self.root / "logs"
