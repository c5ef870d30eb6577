"""C++ source of the optional native CPU kernels, and their build.

`ops.native_kernels` calls them.
"""
