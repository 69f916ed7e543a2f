# /// script
# requires-python = ">=3.10"
# dependencies = ["gguf==0.19.*", "numpy"]
# ///
"""Make gguf.gguf, a small file by the gguf package, and gguf.npz, what that package reads from it.

    uv run tests/golden/make_gguf.py        (or: python, with the packages above)

The file has a field of every type, an alignment that is not the default one, and tensors of the
types F32, Q4_1 and Q8_0: ordinary numbers, blocks that are constant or zero, and scales at both
ends of float16. Nothing here imports the project.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

HERE = Path(__file__).parent
TYPES = {name: GGMLQuantizationType[name] for name in ("F32", "Q4_1", "Q8_0")}


def numbers(rows: int, width: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    x[1, :32] = 0
    x[1, 32:64] = -0.7
    x[2] *= 1e-4  # scales below the smallest normal float16
    x[3] *= 1e4
    return x


def main() -> None:
    file = HERE / "gguf.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_custom_alignment(64)
    for kind in ("uint8", "uint16", "uint32", "uint64"):
        getattr(writer, f"add_{kind}")(f"test.{kind}", np.iinfo(kind).max)
    for kind in ("int8", "int16", "int32", "int64"):
        getattr(writer, f"add_{kind}")(f"test.{kind}", np.iinfo(kind).min)
    writer.add_float32("test.float32", 0.1)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "Grüße 🙂")
    writer.add_array("test.strings", ["a", "", "Ġthe"])
    writer.add_array("test.integers", [3, -1, 2])
    writer.add_array("test.nested", [[1, 2], [3]])
    for seed, (name, kind) in enumerate(TYPES.items()):
        for width in (96, 64) if kind != TYPES["F32"] else (5, 3):
            data = quantize(numbers(4, max(width, 64), seed)[:, :width].copy(), kind)
            writer.add_tensor(f"{name}.{width}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = GGUFReader(file).tensors
    assert {t.tensor_type for t in tensors} == set(TYPES.values())
    expected = {t.name: dequantize(t.data, t.tensor_type) for t in tensors}
    assert all(np.isfinite(x).all() and x.dtype == np.float32 for x in expected.values())
    np.savez(HERE / "gguf.npz", **expected)
    for made in (file, HERE / "gguf.npz"):
        print(f"{made.name}: {made.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
