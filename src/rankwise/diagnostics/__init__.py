"""What a trained adapter looks like inside, and the page that shows it."""

from rankwise.diagnostics.report import write_report
from rankwise.diagnostics.spectra import LayerSpectrum, adapter_spectra

__all__ = ["LayerSpectrum", "adapter_spectra", "write_report"]
