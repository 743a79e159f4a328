"""The ops as a shared library for C++: the native kernel, registered with torch's dispatcher without Python."""
