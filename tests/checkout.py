"""`import checkout` finds the files of this checkout, installed or not, before all others."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
spec = importlib.util.spec_from_file_location("llm2vec_data", ROOT / "data" / "__init__.py")
sys.modules["llm2vec_data"] = importlib.util.module_from_spec(spec)
