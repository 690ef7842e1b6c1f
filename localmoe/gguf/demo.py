"""The path of the demo model, which ships with the package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
DEMO = PACKAGE / "models" / "demo" / "demo.gguf"
"""The model that ships with the package, and is there whatever a person's catalog says."""
