"""All code that deals with LLVM, the CPU, the cache of compiled code and threads; other files use no LLVM."""
