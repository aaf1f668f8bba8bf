"""The embedded quickstart: a tiny base model, arithmetic problems, and the script that made the model."""

from pathlib import Path

BASE_MODEL = Path(__file__).parent / "base_model"
