"""What the long examples print: they run as they are documented, and their figures become rows."""

from . import calibrate, cpp_runner, demo, export, finetune

CASES = tuple(module.CASE for module in (demo, finetune, calibrate, export, cpp_runner))
