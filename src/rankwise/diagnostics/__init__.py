"""What a trained adapter or a completed matrix looks like inside, and the pages that show it."""

from typing import TYPE_CHECKING, Any

from rankwise.diagnostics.report import write_report

if TYPE_CHECKING:
    from rankwise.diagnostics.spectra import LayerSpectrum, adapter_spectra

__all__ = ["LayerSpectrum", "adapter_spectra", "write_report"]


def __getattr__(name: str) -> Any:
    """Adapters need peft; the page of a completed matrix does not."""
    if name in ("LayerSpectrum", "adapter_spectra"):
        from rankwise.diagnostics import spectra

        return getattr(spectra, name)
    raise AttributeError(f"module 'rankwise.diagnostics' has no attribute {name!r}")
