"""What this wheel was built from and with: CMake writes the module, from cmake/_build.py.in."""

VERSION: str
TENSORFLOW: str
COMPILER: str
BUILD_TYPE: str
CPU_INSTRUCTION_SETS: str
NATIVE: bool
