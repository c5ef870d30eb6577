"""C++ of the native CPU kernels, an optional extra, and how it is built; `ops.native` calls them."""
