"""export: ship a rewritten program, its report with it. Exposed as `sparseattn.export`.

`save` and `load` an ExportedProgram, compile it into an AOTInductor package with `aoti`, for C++ with `for_cpp` and
`build_library`, or turn it into ONNX with `onnx`. Every file is written whole or not at all.
"""

from .aot_inductor import aoti
from .cpp_library import build_library
from .cpp_program import for_cpp
from .exported_program import load, save
from .onnx import onnx
from .report_file import read_report

__all__ = ["aoti", "build_library", "for_cpp", "load", "onnx", "read_report", "save"]
